// The folder in transformers.js: node transformers.mjs FOLDER DTYPE '[ids]' NEW
import { basename, dirname } from "node:path";
import { AutoModelForCausalLM, Tensor, env } from "@huggingface/transformers";

const [folder, dtype, ids, count] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const row = JSON.parse(ids).map(BigInt);
const tensor = (values) => new Tensor("int64", BigInt64Array.from(values), [1, values.length]);

const model = await AutoModelForCausalLM.from_pretrained(basename(folder), { dtype, local_files_only: true });
const text = { input_ids: tensor(row), attention_mask: tensor(row.map(() => 1n)) };
const { logits } = await model(text);
const output = await model.generate({ ...text, max_new_tokens: Number(count), do_sample: false });
console.log(JSON.stringify({
  ids: Array.from(output.data, Number), logits: Array.from(logits.data.slice(-logits.dims.at(-1)), Number),
}));
