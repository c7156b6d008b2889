// Prompt in, text out, with libdfssm_runtime in C++: docs/cpp.md says how it is built.
//
//   generate BUNDLE PROMPT [COUNT [TEMPERATURE SEED]]      generate model-ort-cpu "Once upon a time" 100 0.7 1
#include <cstdlib>
#include <dfssm/runtime.hpp>
#include <iostream>

int main(int count, char** arguments) try {
  if (count < 3) {
    std::cerr << "usage: generate BUNDLE PROMPT [COUNT [TEMPERATURE SEED]]\n";
    return 2;
  }
  const long most = count > 3 ? std::atol(arguments[3]) : 128;
  dfssm::Sampling sampling;  // greedy
  if (count > 5)
    sampling = dfssm::Sampling::of(std::atof(arguments[4]), std::strtoull(arguments[5], nullptr, 10));

  const dfssm::Engine engine(arguments[1]);
  dfssm::State state(engine);
  state.prefill(engine.encode(arguments[2]));
  dfssm::Text text(state);
  for (long made = 0; made < most; ++made) {
    const int64_t token = state.sample(sampling);
    if (engine.is_end(token)) break;
    std::cout << text.push(token) << std::flush;
    state.step(token);
  }
  std::cout << text.flush() << '\n';
} catch (const dfssm::Error& error) {
  std::cerr << "generate: " << error.what() << '\n';
  return 1;
}
