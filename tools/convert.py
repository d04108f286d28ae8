"""Converts Hugging Face folders to checkpoints and back: `maxlm convert`, for a checkout that is not installed.

    python tools/convert.py from-hf Llama-3.1-8B/ models/llama3.1-8b --verify
    python tools/convert.py to-hf runs/mine mine-hf --dtype bfloat16 --like Llama-3.1-8B/

docs/convert.md says what is written, and which families are known.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from maxlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
