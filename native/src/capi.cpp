// runtime.h: handles and statuses around the classes. Nothing is thrown across this border.
#include <dfssm/runtime.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "engine.h"
#include "failure.h"
#include "machine.h"
#include "sample.h"
#include "text.h"

using namespace dfssm::native;

struct dfssm_engine {
  std::shared_ptr<const Engine> engine;
};
struct dfssm_state {
  std::unique_ptr<State> state;
};
struct dfssm_text {
  TextStream stream;
};

namespace {

thread_local std::string last_error;

dfssm_status fail(dfssm_status status, const char* text) noexcept {
  try {
    last_error = text;
    const auto is_control = [](unsigned char c) {
      return c < 32 || c == 127;
    };  // in names of a damaged graph
    std::replace_if(last_error.begin(), last_error.end(), is_control, ' ');
  } catch (const std::bad_alloc&) {
    last_error.clear();
  }
  return status;
}

// Runs `work`; its failure as a status, the text for dfssm_last_error.
template <class Work>
dfssm_status guarded(Work&& work) noexcept {
  try {
    work();
    return DFSSM_OK;
  } catch (const Failure& failure) {
    return fail(failure.status, failure.what());
  } catch (const std::bad_alloc&) {
    return fail(DFSSM_SYSTEM, "there is not enough memory: free some");
  } catch (const std::system_error& error) {
    return fail(DFSSM_SYSTEM, error.what());
  } catch (const std::exception& error) {
    return fail(DFSSM_INTERNAL, error.what());
  } catch (...) {
    return fail(DFSSM_INTERNAL, "an unknown error");
  }
}

template <class... Pointers>
void require_given(const Pointers*... pointers) {
  require((... && (pointers != nullptr)), DFSSM_INVALID_ARGUMENT, "a pointer is NULL");
}

// The caller's struct, which may be that of an older version, over defaults.
template <class Struct>
Struct given(const Struct* from) {
  Struct found{};
  if (!from) return found;
  require(from->size >= sizeof from->size && from->size <= sizeof found, DFSSM_INVALID_ARGUMENT,
          "`size` of a struct is " + std::to_string(from->size) + ": set it to its sizeof");
  std::memcpy(&found, from, from->size);
  return found;
}

dfssm_status piece_of(const std::string& text, const char** piece, size_t* length) {
  *piece = text.c_str();
  *length = text.size();
  return DFSSM_OK;
}

}  // namespace

const char* dfssm_version(void) { return DFSSM_VERSION; }

const char* dfssm_last_error(void) { return last_error.c_str(); }

dfssm_status dfssm_engine_open(const char* folder, const dfssm_options* options, dfssm_engine** engine) {
  return guarded([&] {
    require_given(folder, engine);
    const dfssm_options asked = given(options);
    require(asked.threads >= 0 && asked.threads <= 4096, DFSSM_INVALID_ARGUMENT,
            "threads is " + std::to_string(asked.threads) + ": give 0 to 4096 (0 = one a core)");
    *engine = new dfssm_engine{std::make_shared<const Engine>(folder, asked)};
  });
}

void dfssm_engine_free(dfssm_engine* engine) { delete engine; }

int64_t dfssm_vocab_size(const dfssm_engine* engine) { return engine->engine->backend().vocab_size; }

const char* dfssm_model(const dfssm_engine* engine) { return engine->engine->manifest().model().c_str(); }

const char* dfssm_manifest(const dfssm_engine* engine) { return engine->engine->manifest().text.c_str(); }

int dfssm_is_end(const dfssm_engine* engine, int64_t token) { return engine->engine->is_end(token); }

dfssm_status dfssm_state_new(const dfssm_engine* engine, dfssm_state** state) {
  return guarded([&] {
    require_given(engine, state);
    *state = new dfssm_state{std::make_unique<State>(engine->engine)};
  });
}

void dfssm_state_free(dfssm_state* state) { delete state; }

dfssm_status dfssm_state_clone(const dfssm_state* state, dfssm_state** copy) {
  return guarded([&] {
    require_given(state, copy);
    *copy = new dfssm_state{std::make_unique<State>(*state->state)};
  });
}

dfssm_status dfssm_state_copy(dfssm_state* state, const dfssm_state* source) {
  return guarded([&] {
    require_given(state, source);
    state->state->copy(*source->state);
  });
}

dfssm_status dfssm_state_reset(dfssm_state* state) {
  return guarded([&] {
    require_given(state);
    state->state->reset();
  });
}

dfssm_status dfssm_state_save(const dfssm_state* state, const char* path) {
  return guarded([&] {
    require_given(state, path);
    state->state->save(path);
  });
}

dfssm_status dfssm_state_load(const dfssm_engine* engine, const char* path, dfssm_state** state) {
  return guarded([&] {
    require_given(engine, path, state);
    *state = new dfssm_state{State::load(engine->engine, path)};
  });
}

int64_t dfssm_state_tokens(const dfssm_state* state) { return state->state->tokens(); }

const float* dfssm_state_logits(const dfssm_state* state) { return state->state->logits().data(); }

dfssm_status dfssm_prefill(dfssm_state* state, const int64_t* ids, size_t count) {
  return guarded([&] {
    require_given(state, ids);
    state->state->read(ids, count);
  });
}

dfssm_status dfssm_step(dfssm_state* state, int64_t token) { return dfssm_prefill(state, &token, 1); }

dfssm_status dfssm_sample(const dfssm_state* state, const dfssm_sampling* sampling, int64_t* token) {
  return guarded([&] {
    require_given(state, token);
    const State& of = *state->state;
    of.require_sound();
    require(of.tokens() > 0, DFSSM_INVALID_ARGUMENT, "the state has read nothing: give it a prompt first");
    *token = sample(of.logits().data(), of.logits().size(), of.tokens(), given(sampling));
  });
}

dfssm_status dfssm_sample_logits(const float* logits, size_t count, int64_t position,
                                 const dfssm_sampling* sampling, int64_t* token) {
  return guarded([&] {
    require_given(logits, token);
    *token = sample(logits, count, position, given(sampling));
  });
}

int dfssm_has_text(void) { return has_text(); }

dfssm_status dfssm_encode(const dfssm_engine* engine, const char* text, size_t length, int begins,
                          int64_t* ids, size_t capacity, size_t* count) {
  return guarded([&] {
    require_given(engine, text, ids, count);
    const std::vector<int64_t> found = engine->engine->tokenizer().encode({text, length}, begins);
    std::copy_n(found.begin(), std::min(capacity, found.size()), ids);
    *count = found.size();
  });
}

dfssm_status dfssm_text_new(const dfssm_state* state, dfssm_text** text) {
  return guarded([&] {
    require_given(state, text);
    *text = new dfssm_text{TextStream(*state->state)};
  });
}

void dfssm_text_free(dfssm_text* text) { delete text; }

dfssm_status dfssm_text_push(dfssm_text* text, int64_t token, const char** piece, size_t* length) {
  return guarded([&] {
    require_given(text, piece, length);
    piece_of(text->stream.push(token), piece, length);
  });
}

dfssm_status dfssm_text_flush(dfssm_text* text, const char** piece, size_t* length) {
  return guarded([&] {
    require_given(text, piece, length);
    piece_of(text->stream.flush(), piece, length);
  });
}
