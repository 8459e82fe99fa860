"""Reading a configuration must be quick and need no torch: `train` does it before it starts a process."""

import subprocess
import sys


def test_configuration_needs_no_torch():
    code = (
        "import sys, megalong.config.load; print(*[m for m in sys.modules if m in ('torch', 'numpy', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
