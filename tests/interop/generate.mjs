// Text from ONE call of onnxruntime-node: node generate.mjs generate.onnx '[ids]' NEW
import ort from "onnxruntime-node";

const [path, ids, count] = [process.argv[2], JSON.parse(process.argv[3]), Number(process.argv[4])];
const int64 = (values, shape) => new ort.Tensor("int64", BigInt64Array.from(values.map(BigInt)), shape);
const float = (value) => new ort.Tensor("float32", [value], []);

const session = await ort.InferenceSession.create(path);
const { sequences } = await session.run({
  input_ids: int64(ids, [1, ids.length]), max_new_tokens: int64([count], []), eos_token_id: int64([-1], [1]),
  temperature: float(0), top_k: int64([0], []), top_p: float(1), seed: int64([0], []),
});
console.log(JSON.stringify(Array.from(sequences.data, Number)));
