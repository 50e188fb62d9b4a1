"""README's example runs as it stands."""

import re
from pathlib import Path

import pytest
from conftest import EMULATED

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(EMULATED, reason="4,096 tokens take long on the emulator")
def test_the_ten_lines_run():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["y"].shape == (2, 12, 4096, 64)
    assert names["q"].grad is not None
    assert names["y_next"].shape == (2, 12, 64)


def test_there_are_exactly_two_commands():
    assert README.read_text().count("```sh") == 2
