"""Run a Detectron2 tool, such as demo/demo.py or tools/train_net.py, with clove-hub's head and backbones registered.

python -m clove_hub.export.detectron2 demo/demo.py --config-file OUT/seed_0/config.yaml --input IMAGE --output FOLDER
"""

import runpy
import sys
from pathlib import Path

from . import backbone, heads  # noqa: F401  (importing them registers them)

if len(sys.argv) < 2:
    sys.exit(f"{__doc__}\nerror: no tool given, as in the line above")
del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as Python sets it for a script
runpy.run_path(sys.argv[0], run_name="__main__")
