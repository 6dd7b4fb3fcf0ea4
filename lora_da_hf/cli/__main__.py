"""The command line, as `python -m lora_da_hf.cli`."""

import sys

from lora_da_hf.cli.main import main

sys.exit(main())
