"""What people write by hand today: each round a fresh vLLM process and a fresh TRL process, files in between, nothing recorded.

The same model, prompts, counts and training options as a run of the quickstart recipe; plain `LLM.generate`, eager or compiled with a warm cache,
whichever is faster for these prompts, and plain `SFTTrainer` with packing. `python loop_by_hand.py FOLDER MODEL THREADS DTYPE` prints seconds per
part as JSON. FOLDER holds dev.json and train-<round>.json, one for each round, and gets the checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROWS = 8  # answers that one optimiser step learns from, as in the recipe
RATES, EPOCHS = (5e-5, 1e-5), (2, 1)  # of round 1, and of the later ones, as in the recipe


def generate(folder: Path, index: int) -> None:
    """Answer dev greedily and, unless the loop is over, train prompts four times; keep at most two right answers of each."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1")
    os.environ["VLLM_USE_AOT_COMPILE"] = "0"  # what vLLM 0.31 keeps of it on a CPU does not load; Inductor's own cache does
    from number import answer_line  # of the folder `reward`
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder / "current"),  # one path for all rounds: the key of vLLM's compile cache holds it
        dtype=os.environ["DTYPE"],
        max_model_len=512,
        max_num_seqs=128,
        enforce_eager=os.environ["WAY"] == "eager",
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
    )
    tok = llm.get_tokenizer()

    def ask(name: str, params: SamplingParams) -> list[tuple[dict, list[str]]]:
        rows = json.loads((folder / f"{name}.json").read_text())
        texts = [tok.apply_chat_template(row["teacher_messages"], tokenize=False, add_generation_prompt=True) for row in rows]
        prompts = [{"prompt_token_ids": tok(text, add_special_tokens=False)["input_ids"]} for text in texts]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [(row, [answer.text for answer in output.outputs]) for row, output in zip(rows, outputs, strict=True)]

    dev = ask("dev", SamplingParams(temperature=0.0, max_tokens=48))
    print(json.dumps({"accuracy": sum(answer_line(texts[0], row["answer"]) for row, texts in dev) / len(dev)}))
    if (folder / f"train-{index}.json").exists():
        train = ask(f"train-{index}", SamplingParams(n=4, temperature=0.8, max_tokens=48, seed=index))
        kept = [(row, text) for row, texts in train for text in [t for t in texts if answer_line(t, row["answer"])][:2]]
        rows = [{"prompt": row["seen"], "completion": [{"role": "assistant", "content": text}]} for row, text in kept]
        (folder / f"kept-{index}.json").write_text(json.dumps(rows))


def train(folder: Path, index: int) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows, model = json.loads((folder / f"kept-{index}.json").read_text()), str(folder / "current")
    tok = AutoTokenizer.from_pretrained(model)
    texts = [tok.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False) for row in rows]
    length = (
        ROWS * sum(map(len, tok(texts)["input_ids"])) // len(rows)
    )  # a packed row learns from as many answers as a step of the recipe
    args = SFTConfig(
        output_dir=str(folder / "scratch"), learning_rate=RATES[index > 1], num_train_epochs=EPOCHS[index > 1], use_cpu=True,
        packing=True, per_device_train_batch_size=1, max_length=length,
        bf16=os.environ["DTYPE"] == "bfloat16",
        gradient_checkpointing=False, save_strategy="no", report_to="none", lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = SFTTrainer(loaded, args, train_dataset=Dataset.from_list(rows), processing_class=tok)
    trainer.train()
    trainer.save_model(str(folder / f"model-{index}"))


def process(part: str, folder: Path, index: int) -> tuple[float, list[float]]:
    """Run a part in a process of its own: its seconds, and the accuracy that it prints."""
    began = time.monotonic()
    command = [sys.executable, __file__, part, str(folder), str(index)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told = [json.loads(line)["accuracy"] for line in done.stdout.splitlines() if line.startswith('{"accuracy"')]
    return round(time.monotonic() - began, 1), told


def faster_way(folder: Path) -> str:
    """Whether round 1 is faster eager or compiled; the first compiled process only fills the cache. To compile needs g++."""
    seconds = {}
    for way in ("eager", "compiled", "compiled") if shutil.which("g++") else ("eager",):
        os.environ["WAY"] = way
        seconds[way], _ = process("generate", folder, 1)
    return min(seconds, key=lambda way: seconds[way])


def main(folder: Path, model: str) -> dict[str, object]:
    spent: dict[str, list[float]] = {"generate": [], "train": []}
    accuracies: list[float] = []
    current, rounds = folder / "current", len(list(folder.glob("train-*.json")))
    current.symlink_to(model)
    os.environ["WAY"] = faster_way(folder)
    for index in range(1, rounds + 2):
        for part in ("generate", "train") if index <= rounds else ("generate",):
            seconds, told = process(part, folder, index)
            spent[part].append(seconds)
            accuracies += told
        if index <= rounds:
            current.unlink()
            current.symlink_to(folder / f"model-{index}")
    whole = round(sum(map(sum, spent.values())), 1)
    return {"seconds": whole, "way": os.environ["WAY"], "parts": spent, "accuracy": accuracies}


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent / "reward"))  # last: it has a math.py
    if sys.argv[1] in ("generate", "train"):
        globals()[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    else:
        os.environ.update(OMP_NUM_THREADS=sys.argv[3], DTYPE=sys.argv[4])
        print(json.dumps(main(Path(sys.argv[1]).resolve(), sys.argv[2])))
