// Text from ONE call of ONNX Runtime's C++ API: generate generate.onnx '[ids]' NEW
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <iostream>
#include <sstream>
#include <vector>

int main(int, char** argv) {
  std::vector<int64_t> ids;
  std::istringstream text(argv[2] + 1);  // behind the bracket
  for (int64_t id; text >> id; text.ignore()) ids.push_back(id);
  int64_t count = std::stoll(argv[3]), ends = -1, top_k = 0, seed = 0;
  float temperature = 0, top_p = 1;

  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto tensor = [&](auto* data, size_t size, std::vector<int64_t> shape) {
    return Ort::Value::CreateTensor(memory, data, size, shape.data(), shape.size());
  };
  const char* names[] = {"input_ids", "max_new_tokens", "eos_token_id", "temperature", "top_k", "top_p", "seed"};
  Ort::Value inputs[] = {tensor(ids.data(), ids.size(), {1, int64_t(ids.size())}), tensor(&count, 1, {}),
                         tensor(&ends, 1, {1}), tensor(&temperature, 1, {}), tensor(&top_k, 1, {}),
                         tensor(&top_p, 1, {}), tensor(&seed, 1, {})};
  const char* sequences = "sequences";

  Ort::Env env;
  Ort::Session session(env, argv[1], Ort::SessionOptions{});
  auto outputs = session.Run(Ort::RunOptions{}, names, inputs, 7, &sequences, 1);
  auto size = outputs[0].GetTensorTypeAndShapeInfo().GetElementCount();
  for (size_t i = 0; i < size; i++)
    std::cout << (i ? ", " : "[") << outputs[0].GetTensorData<int64_t>()[i];
  std::cout << "]" << std::endl;
}
