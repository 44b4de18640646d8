"""Training runs, one short file each: `linvision train --list`, or by path, `python recipes/NAME.py`.

In an installed package they are `linvision.recipes`. Each is a file to run, and imports the recipe that it changes by
its bare name, as files beside each other do; so the folder is a place to import from.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
