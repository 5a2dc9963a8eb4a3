"""The script of `odconv completion` in a real shell: what it completes, and that it starts no Python for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from odconv.app.cli import COMMANDS, main
from odconv.app.commands.listing import find_recipes
from odconv.app.engine.config import LOGGERS
from odconv.models.zoo import NAMES

pytest.importorskip("shtab")

ASK = """
source "$1"
COMP_WORDS=(odconv "${@:2}") COMP_CWORD=$(($# - 1))
$(complete -p odconv | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script of each shell."""
    folder = tmp_path_factory.mktemp("completion")
    with pytest.MonkeyPatch.context() as patch:
        for shell in ("bash", "zsh", "fish"):
            said: list[str] = []
            patch.setattr("builtins.print", lambda text, said=said: said.append(text))
            assert main(["completion", shell]) == 0
            (folder / shell).write_text("".join(said))
    return folder


@pytest.fixture
def completed(scripts: Path, tmp_path: Path):
    """Return what bash makes of words, the last of which is begun, where nothing but sed can be started."""
    bash = shutil.which("bash")
    if bash is None or sys.platform == "win32":  # where a link needs a right of its own
        pytest.skip("no bash")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sed").symlink_to(shutil.which("sed"))
    (tmp_path / "photo.png").touch()

    def ask(*words: str) -> list[str]:
        command = [bash, "--norc", "--noprofile", "-c", ASK, "bash", str(scripts / "bash"), *words]
        environment = os.environ | {"PATH": str(tmp_path / "bin")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
        assert not done.stderr
        return [word.strip() for word in done.stdout.splitlines() if word]

    return ask


def test_bash_completes_commands_options_and_values(completed) -> None:
    assert {*completed("")} - {"-h", "--help", "--version", "--debug"} == {name.split()[0] for name in COMMANDS}
    assert completed("detect", "") == ["train", "evaluate", "predict", "export"]
    assert completed("train", "--fast") == ["--fast_dev_run"]
    assert completed("detect", "train", "--new") == ["--new_predictor"]
    assert completed("train", "--amp", "") == ["none", "bf16", "fp16"]
    assert completed("train", "--config", "digits") == [name for name in find_recipes("train") if name[:6] == "digits"]
    assert completed("detect", "train", "--config", "") == [*find_recipes("detect train")]
    assert completed("export", "--arch", "odl_resnet1") == [name for name in NAMES if name.startswith("odl_resnet1")]
    assert completed("profile", "--latency", "t") == ["true"]
    assert completed("train", "--logger", "") == [*LOGGERS, "none"]
    assert completed("predict", "pho") == completed("predict", "--weights", "pho") == ["photo.png"]
    assert completed("train", "--epochs", "pho") == []
    assert completed("completion", "z") == ["zsh"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_reads_its_script(shell: str, scripts: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    subprocess.run([shell, "-n", str(scripts / shell)], check=True)


@pytest.mark.parametrize("words", [["bish"], [], ["bash", "zsh"]])
def test_other_shells_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *words]) != 0
    assert "shell" in capsys.readouterr().err
