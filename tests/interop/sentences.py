"""The folder in sentence-transformers' ONNX backend: python sentences.py FOLDER '[texts]'"""

import json
import sys

sys.path.pop(0)  # optimum.py is no library
from sentence_transformers import SentenceTransformer

folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = SentenceTransformer(
    folder,
    backend="onnx",
    local_files_only=True,
    model_kwargs={"provider": "CPUExecutionProvider"},
)
print(json.dumps(model.encode(texts).tolist()))
