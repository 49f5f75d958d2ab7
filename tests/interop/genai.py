"""The folder in onnxruntime-genai: python genai.py FOLDER '[ids]' NEW"""

import json
import sys

import onnxruntime_genai as genai

folder, ids, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = genai.Model(folder)
options = genai.GeneratorParams(model)
options.set_search_options(do_sample=False, max_length=len(ids) + count)
generator = genai.Generator(model, options)
generator.append_tokens([ids])
logits = generator.get_logits().ravel().tolist()
for _ in range(count):
    generator.generate_next_token()
print(json.dumps({"ids": [int(i) for i in generator.get_sequence(0)], "logits": logits}))
