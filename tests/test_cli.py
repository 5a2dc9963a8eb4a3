"""The command line: help, recipes, and one clear message for everything that can be wrong."""

import importlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from small_runs import COMMAND

import odconv
from odconv import __version__, create_model
from odconv.app import cli
from odconv.app.cli import COMMANDS, Command, find_command, main, parse_options
from odconv.app.commands.listing import find_recipes
from odconv.app.commands.profile import profile_networks as profile
from odconv.app.demo import networks as demo
from odconv.app.predict import load_classifier

DIGITS = ["--data", "digits", "--image_size", "8", "--resize_size", "8", "--workers", "0", "--stem", "small"]
TRAIN = ["train", "--arch", "mobilenetv2_050", *DIGITS, "--augment", "small", "--epochs", "1", "--out"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "odconv", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | environment,
    )


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]):
    """Check that a command line fails with one message that says `expected`."""

    def check(expected: str, *arguments: str, status: int = 1) -> None:
        assert main(list(arguments)) == status
        errors = capsys.readouterr().err
        assert errors.count("odconv: error: ") == 1
        assert "Traceback" not in errors
        assert re.search(expected, errors), errors

    return check


def make_folder(root: Path, classes: dict[str, tuple[str, ...]]) -> str:
    from PIL import Image

    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), "red").save(root / split / name / "0.png")
    return str(root)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +{command.purpose}$", text, re.MULTILINE) for name, command in COMMANDS.items())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"odconv {__version__}\n"
    assert main([]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: odconv {command} ")
    for option in re.findall(r"^  (--\w+) ", text, re.MULTILINE):
        if option not in ("--config", "--print_config", "--help"):
            assert re.search(rf"^  {option} [^\n]*\s+\w", text, re.MULTILINE), f"{option} is not explained"


def test_what_lists_and_helps_does_without_torch_and_other_heavy_packages() -> None:
    code = "import sys; from odconv.app.cli import main\n"
    for words in (["--help"], ["--version"], ["trian"], ["models"], ["models", "--help"], ["recipes", "*x*"]):
        code += f"try: main({words})\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules; import odconv; odconv.ODConv2d; assert 'torch' in sys.modules\n"
    code += "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('lightning', 'torchvision', 'torchmetrics', 'sklearn') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_lists(fails, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert capsys.readouterr().out.splitlines() == odconv.list_models()
    assert main(["models", "od_*", "resnet18"]) == 0
    assert capsys.readouterr().out.splitlines() == ["resnet18", *odconv.list_models("od_*")]
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    known = {"train": find_recipes("train"), "detect train": find_recipes("detect train")}
    assert [len(recipes) for recipes in known.values()] == [42, 15]
    for command, recipes in known.items():
        first = lines.index(f"odconv {command} --config") + 1
        shown = dict(line.split(maxsplit=1) for line in lines[first : first + len(recipes)])
        assert shown == {name: file.read_text().splitlines()[0][2:] for name, file in recipes.items()}
    assert main(["recipes", "*rcnn_resnet50"]) == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert words == ["odconv", "faster_rcnn_resnet50", "mask_rcnn_resnet50"]
    fails("there is no network 'vgg'; `odconv models` lists all", "models", "od_*", "vgg")
    fails("there is no recipe 'vgg'; `odconv recipes` lists all", "recipes", "vgg")


def test_the_console_script_is_main() -> None:
    (script,) = entry_points(group="console_scripts", name="odconv")
    assert script.load() is main


def test_what_nobody_foresaw_is_one_line_too(fails, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(*, key: str) -> None:
        """Look a key up.

        Args:
            key: What to look up.
        """
        if key == "shapes":
            torch.ones(2) @ torch.ones(3)
        {}[key]

    monkeypatch.setattr(sys.modules[__name__], "command", command, raising=False)
    monkeypatch.setitem(COMMANDS, "look", Command(f"{__name__}:command", "look a key up"))
    fails(r"error: KeyError: 'x' \(--debug shows where\)\n$", "look", "--key", "x")
    fails(r"error: RuntimeError: .* \(--debug shows where\)\n$", "look", "--key", "shapes")
    with pytest.raises(KeyError):
        main(["look", "--key", "x", "--debug"])


@pytest.mark.parametrize(("package", "extra"), [("lightning", "train"), ("faster_coco_eval", "detect")])
def test_the_extra_that_has_a_package_is_named(
    fails, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "train", Command("odconv_without:train", ""))
    error = ModuleNotFoundError(f"No module named {package!r}", name=package)
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(error))
    fails(rf"No module named '{package}'; .*: pip install 'odconv\[{extra}\]'", "train")


def test_a_switch_takes_no_name_for_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    def options(*arguments: str) -> dict:
        return parse_options("profile", profile, list(arguments))

    for arguments in (["--table", "resnet18"], ["resnet18", "--table"], ["--table=true", "resnet18"]):
        assert (options(*arguments)["table"], options(*arguments)["names"]) == (True, ["resnet18"])
    for arguments in (["--latency", "false", "resnet18"], ["--latency=false", "resnet18"]):
        assert (options(*arguments)["latency"], options(*arguments)["names"]) == (False, ["resnet18"])
    assert (options("--latency", "--table")["latency"], options()["table"]) == (True, False)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no options"),
        (b"# lr: 0.1\n", "holds no options"),
        (b"- lr\n", "holds no options"),
        (b"lr: [0.1\n", "is no YAML: .*expected"),
        (b"\x80\xff\x00", "is no YAML"),
        (b"lr: " + b"[" * 10**5, "is no YAML"),
    ],
)
def test_bad_recipes(fails, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    fails(f"the recipe .*mine.yaml {expected}", "train", "--config", str(tmp_path / "mine.yaml"))


def test_wrong_usage(fails, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("arch: resnet18\nepoch: 3\n")
    out = str(tmp_path / "out")
    fails("unknown command 'trian'; did you mean train", "trian", status=2)
    fails(r"unknown option --epoch; did you mean --epochs\?\n$", *TRAIN, out, "--epoch", "3", status=2)
    fails(r"unknown option 'epoch'; did you mean epochs\?\n$", "train", "--config", str(recipe), status=2)
    fails("missing: --out, --arch; a recipe may have them: --config NAME", "train", "--data", "digits", status=2)
    fails("missing: images, --weights\n$", "predict", status=2)
    fails("--resume needs a value\n$", *TRAIN, out, "--resume", status=2)
    fails("recipe 'od_resnet18_4'; did you mean od_resnet18_4x", "train", "--config", "od_resnet18_4")
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("lr", "fast", "a number"),
        ("epochs", "2.5", "a whole number"),
        ("kernel_num", "many", "a whole number"),
        ("devices", "all", "a whole number or auto"),
        ("schedule", "3", "a list of whole numbers in brackets"),
        ("layer_options", "norm", "a mapping, such as {name: value}"),
        ("compile", "maybe", "true or false"),
        ("optimizer", "adam", "sgd or adamw"),
        ("amp", "fp8", "none, bf16 or fp16"),
    ],
)
def test_values_of_another_kind(fails, tmp_path: Path, option: str, value: str, expected: str) -> None:
    hint = {"adam": r"; did you mean adamw\?"}.get(value, "")
    message = f"error: {option} must be {re.escape(expected)}, got {value}{hint}\n$"
    fails(message, *TRAIN, str(tmp_path / "out"), f"--{option}={value}", status=2)
    (tmp_path / "mine.yaml").write_text(f"{option}: {value}\n")
    fails(message, *TRAIN, str(tmp_path / "out"), "--config", str(tmp_path / "mine.yaml"), status=2)
    assert not (tmp_path / "out").exists()


def test_one_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, dict[str, str]] = {}

    def look(parser: jsonargparse.ArgumentParser, words: list[str]) -> None:
        typed = [action for action in parser._actions if hasattr(action, "_typehint")]
        options[parser.prog] = {action.dest: cli._allowed(action._typehint) for action in typed}
        raise jsonargparse.ArgumentError(None, "looked")

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", look)
    for name, command in COMMANDS.items():
        module, _, function = command.target.partition(":")
        with pytest.raises(cli.UsageError, match="looked"):
            parse_options(name, getattr(importlib.import_module(module), function), [])
    assert sum(map(len, options.values())) > 200
    assert all(all(allowed.values()) for allowed in options.values())  # each says what it takes
    # processes that train or evaluate together are counted; one that works alone is told where
    computing = {
        "devices": {"train", "evaluate", "detect train", "detect evaluate"},
        "device": {"predict", "demo", "visualize", "export", "profile", "detect predict", "detect export"},
    }
    for option, commands in computing.items():
        assert {name.removeprefix("odconv ") for name, allowed in options.items() if option in allowed} == commands
    assert {allowed["device"] for allowed in options.values() if "device" in allowed} == {"auto, cpu or gpu"}
    assert not any("input_size" in allowed for allowed in options.values())  # it is image_size


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("lr", "-0.1", r"lr must be above 0, got -0\.1"),
        ("lr", ".nan", "lr must be above 0, got nan"),
        ("epochs", "0", "epochs must be at least 1, got 0"),
        ("batch_size", "0", "batch_size must be at least 1, got 0"),
        ("kernel_num", "0", "kernel_num must be at least 1, got 0"),
        ("wd", "-1", "wd must be at least 0, got -1"),
        ("dropout", "1", "dropout must be at least 0 and below 1, got 1"),
        ("momentum", "1", "momentum must be at least 0 and below 1, got 1"),
        ("temp_epoch", "-1", "temp_epoch must be at least 0, got -1"),
        ("temp_init", "0.5", r"temp_init must be at least 1, got 0\.5"),
        ("devices", "0", "devices must be at least 1, got 0"),
        ("num_classes", "9", "num_classes must be at least 10, the classes in the data, got 9"),
        ("arch", "od_resnet19", "od_resnet18"),
        ("weights", "missing.pth", "missing.pth"),
        ("resume", "missing.ckpt", r"missing\.ckpt does not exist"),
    ],
)
def test_bad_values(fails, tmp_path: Path, option: str, value: str, expected: str) -> None:
    fails(expected, *TRAIN, str(tmp_path / "out"), f"--{option}={value}")


def test_bad_data(fails, tmp_path: Path) -> None:
    train = [*TRAIN, str(tmp_path / "out"), "--data"]
    (tmp_path / "empty").mkdir()
    fails("the data folder .*nowhere does not exist", *train, str(tmp_path / "nowhere"))
    fails("has no train/ and no val/", *train, str(tmp_path / "empty"))
    no_val = make_folder(tmp_path / "no_val", {"train": ("cat", "dog")})
    fails("has no val/", *train, no_val)
    no_train = make_folder(tmp_path / "no_train", {"val": ("cat", "dog")})
    fails("has no train/", *train, no_train)
    differ = make_folder(tmp_path / "differ", {"train": ("cat", "dog"), "val": ("cat", "cow")})
    fails("different classes.*dog.*cow", *train, differ)


@pytest.mark.parametrize("command", ["detect export", "detect evaluate"])
@pytest.mark.parametrize(
    ("words", "value"),
    [([], None), (["--masked_pool"], True), (["--masked_pool", "false"], False), (["--masked_pool", "null"], None)],
    ids=str,
)
def test_switches_whose_default_is_said_elsewhere(command: str, words: list[str], value: bool | None) -> None:
    given = ["--weights", "x.ckpt", *words, *(["--out", "x.onnx"] if "export" in command else ["--data", "coco"])]
    assert parse_options(command, find_command(command), given).get("masked_pool") is value


def test_sizes_are_a_switch() -> None:
    given = ["--weights", "x.ckpt", "--sizes", "--out", "x.onnx"]
    assert parse_options("detect export", find_command("detect export"), given)["sizes"] is True


def test_bad_checkpoints(fails, tmp_path: Path) -> None:
    good, short, hostile = (tmp_path / name for name in ("good.pth", "short.pth", "hostile.pth"))
    torch.save(create_model("od_tiny", kernel_num=2, num_classes=10).state_dict(), good)
    short.write_bytes(good.read_bytes()[:100_000])
    mark = tmp_path / "was_run"
    hostile.write_bytes(pickle.dumps(Hostile(str(mark))))
    for command in (
        ["evaluate", *DIGITS, "--arch", "od_tiny", "--weights"],
        ["predict", "x.png", "--arch", "od_tiny", "--weights"],
        [*TRAIN, str(tmp_path / "resumed"), "--resume"],
        [*TRAIN, str(tmp_path / "started"), "--arch", "od_tiny", "--weights"],
    ):
        fails("missing.pth", *command, str(tmp_path / "missing.pth"))
        fails("short.pth is no PyTorch checkpoint, or damaged or cut short", *command, str(short))
        fails("hostile.pth", *command, str(hostile))
        for path in tmp_path.glob("*ed"):
            shutil.rmtree(path)
    assert not mark.exists()
    exported = tmp_path / "net.onnx"
    exported.touch()
    fails(
        "net.onnx is an exported network, which odconv predict alone takes; give its checkpoint",
        *["evaluate", *DIGITS, "--weights", str(exported)],
    )
    fails(
        "kernel_num is 2 in the file, 4 in the model",
        *["evaluate", *DIGITS, "--arch", "od_tiny", "--kernel_num", "4", "--weights", str(good)],
    )
    fails("holds no state of a training run", *TRAIN, str(tmp_path / "out"), "--resume", str(good))


def test_where_to_compute(fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, out = str(tmp_path / "net.pth"), tmp_path / "net.onnx"
    torch.save(create_model("mobilenetv2_050", num_classes=10).state_dict(), weights)
    network = ["--weights", weights, "--arch", "mobilenetv2_050", "--device"]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "device gpu needs an accelerator, and PyTorch finds none here"
    for command in (
        ["predict", "x.png"],
        ["export", "--out", str(out)],
        ["visualize", "x.png", "--out", str(tmp_path)],
    ):
        fails(message, *command, *network, "gpu")
    fails(message, "detect", "predict", "x.png", "--weights", weights, "--out", str(tmp_path), "--device", "gpu")
    fails(message, "profile", "resnet18", "--device", "gpu")
    fails("is an exported network; leave out device", "predict", "x.png", "--weights", str(out), "--device", "cpu")
    assert not out.exists()
    for device in ("cpu", "auto"):
        assert load_classifier(weights, arch="mobilenetv2_050", device=device).device == torch.device("cpu")
    meta = torch.device("meta")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: meta)
    shared = {"arch": "mobilenetv2_050", "device": "gpu"}
    for network in demo.load(weights, weights, "mobilenetv2_050", **shared):
        assert {parameter.device for parameter in network.model.parameters()} == {network.classifier.device} == {meta}


class Hostile:
    """Pickled code."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_bad_output_folders(fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails("the output folder .*file/out cannot be written: Not a directory", *TRAIN, str(tmp_path / "file" / "out"))
    fails("is not empty; resume=auto", *TRAIN, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_recipe_overridden_by_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("arch: resnet18\nepochs: 3\nlr: 1e-3\n")
    shown = {}
    flags = ["--data=x", "--lr", "0.2", "--wd=0"]
    for name in ("od_resnet18_4x", str(recipe)):
        for place, given in enumerate(
            (["--config", name, *flags], [*flags, "--config", name], [*flags, f"--config={name}", "--seed=1"])
        ):
            with pytest.raises(SystemExit) as done:
                main(["train", *given, "--out=y", "--print_config"])
            assert done.value.code == 0
            shown[name, place] = yaml.safe_load(capsys.readouterr().out)
    for place in range(3):
        ours, mine = shown["od_resnet18_4x", place], shown[str(recipe), place]
        assert (ours["kernel_num"], ours["epochs"]) == (4, 100)
        assert (mine["arch"], mine["epochs"]) == ("resnet18", 3)
    assert all((options["lr"], options["wd"], options["data"]) == (0.2, 0, "x") for options in shown.values())


def test_a_run_from_start_to_end(fails, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, result = tmp_path / "run", tmp_path / "result.json"
    done = run(*TRAIN, str(out), "--batch_size", "128")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^epoch   1/1   loss .* top-1 +[\d.]+ %   top-5 +[\d.]+ %", done.stdout, re.MULTILINE)
    again = ["train", "--config", str(out / "config.yaml")]
    fails("run is not empty; resume=auto", *again)
    fails(
        "its arch is mobilenetv2_050, that of this run mobilenetv2_075",
        *again,
        "--resume=auto",
        "--arch=mobilenetv2_075",
    )
    assert main(["evaluate", "--weights", str(out / "best.ckpt"), "--data", "digits", "--out", str(result)]) == 0
    assert re.search(r"top-1 +[\d.]+ % .* 360 images", capsys.readouterr().out)
    assert json.loads(result.read_text())["images"] == 360


def test_debug_shows_where_an_error_arose(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        main(["evaluate", "--debug", "--weights", str(tmp_path / "none.pth"), "--data", "digits"])


@pytest.mark.slow
def test_signals_end_a_run_quietly(tmp_path: Path) -> None:
    signals = {signal.SIGINT: 130, signal.SIGTERM: 143}
    processes = {
        sent: subprocess.Popen(
            [*COMMAND, *TRAIN, str(tmp_path / sent.name), "--epochs", "1000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for sent in signals
    }
    for sent, process in processes.items():
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                break
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (signals[sent], "")
        assert torch.load(tmp_path / sent.name / "last.ckpt", weights_only=True)["epoch"] >= 0


@pytest.mark.slow
def test_two_processes_started_by_the_trainer(fails, tmp_path: Path) -> None:
    out, result = tmp_path / "run", tmp_path / "result.json"
    train = [*TRAIN, str(out), "--devices", "2"]
    fails(
        "batch_size must be a multiple of the number of processes x accumulate = 2 x 1, got 33",
        *train,
        "--batch_size",
        "33",
    )
    done = run(*train, "--batch_size", "128", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1/1") == 1
    assert "warn" not in done.stderr.lower()
    assert main(["evaluate", "--weights", str(out / "last.ckpt"), "--data", "digits", "--out", str(result)]) == 0
    one, two = json.loads(result.read_text()), json.loads((out / "result.json").read_text())
    assert (two["top1"], two["top5"]) == (pytest.approx(one["top1"], abs=1e-3), pytest.approx(one["top5"], abs=1e-3))
