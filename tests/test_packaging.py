"""The package as others install it: a wheel, few packages for prediction, extras for the rest."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import small_detectors as small
import small_runs as runs
from PIL import Image

from direct_pt.models.exported import write_onnx

ROOT = Path(__file__).parents[1]


def test_extras_are_the_whole_list() -> None:
    """pyproject.toml's dependencies and extras together are requirements.txt, with the same ranges."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert sorted(listed) == sorted(filter(None, lines))


@pytest.mark.slow
def test_wheel_without_torch(tmp_path: Path) -> None:
    """In an empty environment the wheel predicts with an exported detector, and says what the rest needs."""
    source = tmp_path / "source"  # building leaves files beside what it builds
    shutil.copytree(ROOT / "direct_pt", source / "direct_pt")
    shutil.copy(ROOT / "pyproject.toml", source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True, timeout=300)
    python = tmp_path / "env/bin/python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
        wheel,
    ]
    done = subprocess.run(install, capture_output=True, text=True, timeout=600)
    if done.returncode and re.search(r"connection|resolve host", done.stderr, re.IGNORECASE):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    detector = small.small_detector(small.MASK)
    write_onnx(detector, tmp_path / "model.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((200, 160)).save(tmp_path / "photo.png")
    program = (
        "import json, sys, direct_pt\n"
        "assert 'site-packages' in direct_pt.__file__ and 'torch' not in sys.modules\n"
        "result = direct_pt.OnnxDetector('model.onnx').predict('photo.png', score_threshold=0.06)[0]\n"
        "result['masks'] = result['masks'].sum(axis=(1, 2))\n"
        "plain = {name: getattr(value, 'tolist', lambda: value)() for name, value in result.items()}\n"
        "try:\n"
        "    direct_pt.from_pretrained\n"
        "except ModuleNotFoundError as error:\n"
        "    plain['error'] = str(error)\n"
        "print(json.dumps(plain))\n"
    )
    done = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), detector.predict(tmp_path / "photo.png", score_threshold=0.06)[0]
    assert "direct-pt[train]" in found["error"]
    assert found["labels"] == expected["labels"] and len(found["labels"]) > 3
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=0.01)
    np.testing.assert_allclose(found["masks"], expected["masks"].sum(axis=(1, 2)), atol=5)
    module = next((tmp_path / "env/lib").glob("python*/site-packages/direct_pt/onnx_detector.py"))
    command = [python, module, "model.onnx", "photo.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=runs.ENVIRONMENT)
    assert done.returncode == 0 and json.loads(done.stdout)["file"] == "photo.png", done.stderr
