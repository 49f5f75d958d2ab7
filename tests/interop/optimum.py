"""The folder in optimum: python optimum.py FOLDER FILE '[ids]' NEW"""

import json
import sys

sys.path.pop(0)  # this file has the library's name
import torch
from optimum.onnxruntime import ORTModelForCausalLM

folder, name, ids, count = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
model = ORTModelForCausalLM.from_pretrained(
    folder, subfolder="onnx", file_name=name, local_files_only=True
)
prompt = torch.tensor([ids])
logits = model(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits[0, -1]
text = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    max_new_tokens=count,
    do_sample=False,
    eos_token_id=None,
)
print(json.dumps({"ids": text[0].tolist(), "logits": logits.tolist()}))
