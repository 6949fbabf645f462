"""What people write by hand today: each round a fresh vLLM process and a fresh TRL process, files in between, nothing recorded.

The same model, prompts, counts and training options as the quickstart recipe; plain `LLM.generate` and plain `SFTTrainer` with their
own batching. `python loop_by_hand.py FOLDER MODEL THREADS DTYPE` prints seconds per part as JSON. FOLDER gets train.json, dev.json and the checkpoints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 3


def generate(folder: Path, model: str, index: int) -> None:
    """Answer dev greedily and, unless the loop is over, train prompts four times; keep at most two right answers of each."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1")
    from vllm import LLM, SamplingParams

    from reward.number import answer_line

    llm = LLM(
        model,
        dtype=os.environ["DTYPE"],
        max_model_len=512,
        max_num_seqs=128,
        enforce_eager=True,
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
    if index <= ROUNDS:
        train = ask("train", SamplingParams(n=4, temperature=0.8, max_tokens=48, seed=index))
        kept = [(row, text) for row, texts in train for text in [t for t in texts if answer_line(t, row["answer"])][:2]]
        rows = [{"prompt": row["seen"], "completion": [{"role": "assistant", "content": text}]} for row, text in kept]
        (folder / f"kept-{index}.json").write_text(json.dumps(rows))


def train(folder: Path, model: str, index: int) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = json.loads((folder / f"kept-{index}.json").read_text())
    args = SFTConfig(
        output_dir=str(folder / "scratch"), learning_rate=5e-5, num_train_epochs=2, per_device_train_batch_size=8, use_cpu=True,
        bf16=os.environ["DTYPE"] == "bfloat16",
        gradient_checkpointing=False, save_strategy="no", report_to="none", lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = SFTTrainer(
        loaded, args, train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(model)
    )
    trainer.train()
    trainer.save_model(str(folder / f"model-{index}"))


def main(folder: Path, model: str) -> dict[str, object]:
    spent: dict[str, list[float]] = {"generate": [], "train": []}
    accuracies: list[float] = []

    def process(part: str, source: str, index: int) -> None:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, __file__, part, str(folder), source, str(index)], stdout=subprocess.PIPE, text=True, check=True
        )
        spent[part].append(round(time.monotonic() - began, 1))
        accuracies.extend(json.loads(line)["accuracy"] for line in done.stdout.splitlines() if line.startswith('{"accuracy"'))

    for index in range(1, ROUNDS + 1):
        process("generate", model, index)
        process("train", model, index)
        model = str(folder / f"model-{index}")
    process("generate", model, ROUNDS + 1)
    return {"seconds": round(sum(map(sum, spent.values())), 1), "parts": spent, "accuracy": accuracies}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if sys.argv[1] in ("generate", "train"):
        globals()[sys.argv[1]](Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        os.environ.update(OMP_NUM_THREADS=sys.argv[3], DTYPE=sys.argv[4])
        print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
