"""What the server of processes.py imports once, before it forks."""

import importlib
import importlib.util

from processes import COMMANDS

for _door in COMMANDS:
    if importlib.util.find_spec(f"mnistm_dist.{_door}"):
        importlib.import_module(f"mnistm_dist.{_door}")
for _module in ("launch", "loop", "inference", "evaluate", "reporting.html", "reporting.figures", "data.loader"):
    importlib.import_module(f"mnistm_dist.{_module}")
