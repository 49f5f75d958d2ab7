"""The folder in whichever onnxruntime Python finds: python runtime.py FOLDER '[ids]' NEW"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from onnxlm import SUFFIXES, OnnxLM

CPU = ["CPUExecutionProvider"]
folder, ids, count = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
options = dict(max_new_tokens=count, temperature=0.0, top_k=0, top_p=1.0, seed=0, eos_token_id=[-1])
feeds = {
    name: np.array(value, np.float32 if isinstance(value, float) else np.int64)
    for name, value in options.items()
}
found = {"version": onnxruntime.__version__}
for precision, suffix in SUFFIXES.items():
    lm = OnnxLM(folder, precision, providers=CPU)
    one_call = onnxruntime.InferenceSession(
        folder / "onnx" / f"generate{suffix}.onnx", providers=CPU
    )
    found[precision] = {
        "logits": lm(np.array([ids]))[0, -1].tolist(),
        "ids": lm.generate(np.array([ids]), max_new_tokens=count, eos_token_id=())[0].tolist(),
        "one_call": one_call.run(None, {"input_ids": np.array([ids])} | feeds)[0][0].tolist(),
    }
print(json.dumps(found))
