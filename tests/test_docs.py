"""The documentation's code runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_tests_of_the_testing_page_pass(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "testing.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        (tmp_path / f"test_block_{number}.py").write_text(block)
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(run, cwd=DOCS.parent, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
