"""`python -m onnxlm`, once installed. In a clone, onnxlm.py itself is run."""

import sys

from onnxlm import main

sys.exit(main())
