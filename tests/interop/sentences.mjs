// An embedder's folder in transformers.js, and its graph in onnxruntime-web on WASM: node sentences.mjs FOLDER DTYPE FILE '[texts]'
import { readFile } from "node:fs/promises";
import { basename, dirname } from "node:path";
import { AutoTokenizer, Tensor, env, mean_pooling, pipeline } from "@huggingface/transformers";
import * as ort from "onnxruntime-web";

const [folder, dtype, file, asked] = process.argv.slice(2);
const texts = JSON.parse(asked);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);

const embed = await pipeline("feature-extraction", basename(folder), { dtype, local_files_only: true });
const vectors = await embed(texts, { pooling: "mean", normalize: true });

const tokenizer = await AutoTokenizer.from_pretrained(basename(folder), { local_files_only: true });
const session = await ort.InferenceSession.create(await readFile(`${folder}/onnx/${file}`), { executionProviders: ["wasm"] });
const inputs = tokenizer(texts, { padding: true });
const feeds = session.inputNames.map((name) => [name, new ort.Tensor("int64", inputs[name].data, inputs[name].dims)]);
const { last_hidden_state: { data, dims } } = await session.run(Object.fromEntries(feeds));
const inWasm = mean_pooling(new Tensor("float32", data, dims), inputs.attention_mask).normalize(2, -1);
console.log(JSON.stringify([vectors, inWasm].map((found) => found.tolist())));
