"""A small model and a small run, and what may stand in their files instead: odd values, odd tensors, damaged bytes."""

import copy
import functools
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import odd_data
import torch
from odd_data import Files, Make
from safetensors.torch import load, save
from torch import Tensor

from direct_pt.checkpoint import save_model
from direct_pt.files import CHECKSUM, FACTS, _checksum
from direct_pt.models.detector import Detector, DetectorConfig, build_detector
from direct_pt.recipes import PRETRAIN, Augmentation
from direct_pt.training.checkpoints import TrainingState, save_training_state
from direct_pt.training.choices import Choices
from direct_pt.training.plan import make_plan
from direct_pt.training.progress import Progress
from direct_pt.training.settings import PretrainFlags, parse_flags

MODEL, CONFIG, WEIGHTS = "model", "model/config.json", "model/model.safetensors"
CLASSES = {10: "cat", 20: "dog"}
STEPS = 8  # of the run, with a checkpoint in the middle and one at its end
FLAGS = (
    *("--model", "retinanet_r50_fpn", "--backbone", "test_resnet", "--channels", "4", "--data", "data"),
    *("--max-steps", str(STEPS), "--global-batch-size", "8", "--micro-batch-size", "4", "--ema", "0.9"),
)
STATE = [f"run/checkpoints/step-{step}/{name}.safetensors" for step in (4, 8) for name in ("model", "optimizer")]
DEEP = 5000  # levels
ODD = [
    *odd_data.ODD,
    *("batch", "group", "2fc", "mask_rcnn_swin_t_fpn", "regnety_2560", "test_resnet.r160_in1k", "step", "\u202e"),
    *(16_384, 16_385, 10**8, 1e20, [10**8] * 3, {"AP": float("nan")}, [{}], [[]] * 50),
]
WORDS = [
    *b'null true -1 0 1e400 NaN 10000000 "" [] {} "a" 99999999999999999999 [[[[ F64 I64 BF16 BOOL C64 F8_E4M3'.split(),
    *(b"\xff", b"\0", b"[" * DEEP, b'{"a":' * DEEP, b"\n", b"9" * 5000),
]


def small_detector() -> Detector:
    """The smallest that all code for detectors reads."""
    config = DetectorConfig.from_paper("retinanet_r50_fpn", tuple(CLASSES.values()), tuple(CLASSES))
    config = replace(config, backbone="test_resnet", channels=4, short_side=64, long_side=64)
    return build_detector(config.name, config=config)


@functools.cache
def usual_run() -> Files:
    """A model's folder and a run's, as training writes them."""
    torch.manual_seed(0)
    detector = small_detector()
    flags = parse_flags(PretrainFlags, "", [*FLAGS, "--output-dir", "run"])
    plan = make_plan(flags.schedule, PRETRAIN.recipe("retinanet_r50_fpn", "sgd"), 100, 1)
    momentum = {f"{name}/momentum_buffer": torch.zeros_like(p) for name, p in detector.named_parameters()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / MODEL, detector, [{"stage": "pretrain", "steps": STEPS, "lr": 0.1}])
        weights = detector.state_dict()
        for step in (4, 8):
            progress = Progress(step=step, good_steps=step, average_loss=1.5, lowest_early=1.0, calm_step=step)
            log = {"losses": {"class": 1.5, "box": 0.5}, "updates": 2, "largest_norm": 3.5, "steps": 2, "feed": None}
            state = TrainingState(progress, weights, momentum, weights, None, [log], 4)
            save_training_state(folder / "run/checkpoints", state, keep=9)
        split = {"images": 100, "objects": 300, "digest": "00ff"}
        content = {
            "settings": flags.to_dict(),
            "choices": Choices(Augmentation()).to_json(),
            "plan": asdict(plan),
            "data": {"classes": {str(key): value for key, value in CLASSES.items()}, "train": split, "val": None},
            "git": "0748100",
            "launcher": "host 1 2.00",
        }
        (folder / "run/config.json").write_text(json.dumps(content, indent=2))
        figures = dict.fromkeys(("AP", "AP50", "AP75"), 0.25)
        records = [
            {"step": 2, "loss": 2.0, "losses": {"class": 1.5, "box": 0.5}, "lr": 0.01, "gradient_norm": None},
            {"step": 4, "epoch": 0.3, "bbox": figures, "per_class": {"cat": {"bbox": figures, "objects": 3}}},
            {"step": 6, "loss": None, "losses": {}, "lr": 0.01, "gradient_norm": 2.5},
            {"step": 8, "epoch": 0.6, "bbox": figures, "segm": figures, "per_class": {}},
        ]
        (folder / "run/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model_inputs() -> tuple[Files, Make]:
    """A model's folder, and changes of it."""
    usual = {path: content for path, content in usual_run().items() if path.startswith(MODEL)}
    return usual, partial(changed_files, usual, [CONFIG] * 3 + [WEIGHTS])


def run_inputs() -> tuple[Files, Make]:
    """A run's folder, and changes of it."""
    usual = {path: content for path, content in usual_run().items() if path.startswith("run")}
    return usual, partial(changed_files, usual, ["run/config.json"] * 4 + ["run/metrics.jsonl"] * 3 + STATE)


def changed_files(usual: Files, paths: Sequence[str], rng: random.Random) -> Files:
    """One of the files changed, now and then one more left out."""
    path = rng.choice(paths)
    content = usual[path] or b""
    if path.endswith(".safetensors"):
        change = rng.choice((odd_facts, odd_facts, odd_tensors, odd_header, partial(damaged_start, tokens=WORDS)))
    elif path.endswith(".jsonl"):
        change = rng.choice((odd_line, odd_line, partial(odd_data.damaged, tokens=WORDS)))
    else:
        byte_changes = (partial(odd_data.damaged, tokens=WORDS), partial(odd_data.other_word, tokens=WORDS))
        change = rng.choice((odd_document, odd_document, *byte_changes))
    files: Files = {path: change(rng, content)}
    if rng.random() < 0.02:
        files[rng.choice(sorted(usual))] = None
    return files


# JSON


def odd_document(rng: random.Random, content: bytes) -> bytes:
    """One to three values of a JSON document changed."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = odd_value(rng, value)
    text = json.dumps(value)
    if rng.random() < 0.05:  # deeper than the module writes
        text = text.replace("null", rng.choice(("[" * DEEP + "]" * DEEP, '{"a":' * 500 + "1" + "}" * 500)), 1)
    return text.encode("utf-8", "surrogatepass")


def odd_value(rng: random.Random, value: Any) -> Any:
    """A value of JSON with one place of it changed."""
    whole = copy.deepcopy(value)
    places = list(places_in(whole))
    if not places or rng.random() < 0.02:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(odd_data.NAMES)] = rng.choice(ODD)
        case 1 | 2 if isinstance(holder, list):
            holder.insert(key, rng.choice((holder[key], rng.choice(ODD))))
        case 2:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place])
        case 3 if type(holder[key]) in (int, float):
            holder[key] = holder[key] * rng.choice((-1, 0, 2, 1000, 1e9)) + rng.choice((0, 0, 1, -1, 0.5))
        case 4 if isinstance(holder[key], int | float | bool) and abs(holder[key]) < 2**1000:  # a float holds it
            holder[key] = rng.choice((str(holder[key]), [holder[key]], not holder[key], float(holder[key])))
        case _:
            holder[key] = rng.choice(ODD)
    return whole


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (list or object, index or key) in a value."""
    found: list[tuple[Any, Any]] = []
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found += [(value, key), *places_in(inner)]
    return found


def odd_line(rng: random.Random, content: bytes) -> bytes:
    """A line of a file of JSON lines changed, left out, doubled or cut."""
    lines = content.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            del lines[place]
        case 1:
            lines.insert(place, rng.choice(lines))
        case 2:
            lines[place] = lines[place][: rng.randrange(len(lines[place]))]
        case _:
            lines[place] = odd_document(rng, lines[place]) + b"\n"
    return b"".join(lines)


# Files of tensors


def parts_of(content: bytes) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file, and the text of its facts."""
    size = int.from_bytes(content[:8], "little")
    return load(content), json.loads(content[8 : 8 + size])["__metadata__"][FACTS]


def with_checksum(tensors: dict[str, Tensor], facts: str) -> bytes:
    """Such a file, as the program writes it."""
    return save(tensors, {"format": "pt", FACTS: facts, CHECKSUM: _checksum(tensors, facts)})


def odd_facts(rng: random.Random, content: bytes) -> bytes:
    """Other facts, with the right checksum."""
    tensors, facts = parts_of(content)
    try:
        return with_checksum(tensors, odd_document(rng, facts.encode()).decode())
    except UnicodeError:
        return with_checksum(tensors, "[" * DEEP)


def odd_tensors(rng: random.Random, content: bytes) -> bytes:
    """Another tensor, one more or one less, with the right checksum."""
    tensors, facts = parts_of(content)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    changes: list[Callable[[], Tensor | None]] = [
        lambda: None,
        lambda: value.flatten()[: rng.randrange(value.numel() + 1)],
        lambda: value[None],
        lambda: value.to(rng.choice((torch.int64, torch.float16, torch.float64, torch.bool, torch.complex64))),
        lambda: torch.full_like(value.float(), rng.choice((float("nan"), float("inf"), 0.0, 1e30))),
        lambda: torch.zeros(rng.choice(((0,), (0, 10**8), (1,), (10**5,)))),
    ]
    changed = rng.choice(changes)()
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    if changed is None:
        if rng.random() < 0.5:
            rest[rng.choice(("more", f"{name}/more", ""))] = value.clone()
        return with_checksum(rest, facts)
    return with_checksum({**rest, name: changed.contiguous()}, facts)


def odd_header(rng: random.Random, content: bytes) -> bytes:
    """The header changed, without another checksum; its length is right most times."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"].pop(rng.choice((CHECKSUM, "format", FACTS)), None)
    if rng.random() < 0.7:
        header = odd_value(rng, header)
    text = json.dumps(header).encode()
    stated = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 10**8, 2**63, len(text) + 1))
    return stated.to_bytes(8, "little") + text + content[8 + size :]


def damaged_start(rng: random.Random, content: bytes, tokens: Sequence[bytes]) -> bytes:
    """Its bytes damaged, mostly in the header."""
    size = 8 + int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        return odd_data.damaged(rng, content, tokens)
    return odd_data.damaged(rng, content[:size], tokens) + content[size:]
