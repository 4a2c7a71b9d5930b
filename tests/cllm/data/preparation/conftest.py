import sys
from pathlib import Path

# Workers find the modules of these tests where this process does.
sys.path.insert(0, str(Path(__file__).parent))
