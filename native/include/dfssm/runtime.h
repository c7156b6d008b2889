/* Runs bundles of dfcompile: the C interface of libdfssm_runtime. docs/cpp.md is its guide; runtime.hpp wraps it in
 * C++.
 *
 * What can fail returns a dfssm_status, and dfssm_last_error() then says why in one line. Nothing throws or exits.
 * Token ids are int64_t, 0 <= id < dfssm_vocab_size(). Texts are UTF-8.
 *
 * Threads may share an engine. A state and a text serve one thread at a time, and keep what they need of their engine:
 * handles may be freed in any order. Freeing NULL does nothing. */
#ifndef DFSSM_RUNTIME_H
#define DFSSM_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#define DFSSM_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum dfssm_status {
  DFSSM_OK = 0,
  DFSSM_INVALID_ARGUMENT = 1, /* an argument is out of range */
  DFSSM_BAD_BUNDLE = 2,       /* missing, incomplete, altered, of another machine or version */
  DFSSM_UNTRUSTED = 3,        /* it holds code that may only run with `trust` */
  DFSSM_BACKEND = 4,          /* ONNX Runtime, TensorRT or the kernels are missing, or refuse */
  DFSSM_BAD_STATE = 5,        /* of another model, damaged, or broken by a run that failed */
  DFSSM_NOT_FINITE = 6,       /* the model's numbers are NaN or infinite */
  DFSSM_UNSUPPORTED = 7,      /* this library was built without it */
  DFSSM_SYSTEM = 8,           /* a file cannot be written, or there is not enough memory */
  DFSSM_INTERNAL = 9          /* a bug of this library */
} dfssm_status;

/* A bundle, opened: weights only. */
typedef struct dfssm_engine dfssm_engine;
/* What one sequence remembers, and the logits after its last token. */
typedef struct dfssm_state dfssm_state;
/* From tokens to text as they come. */
typedef struct dfssm_text dfssm_text;

/* How a bundle is opened. `size` is sizeof(dfssm_options): begin with `dfssm_options options = {sizeof options};`.
 * Zeros are the defaults. */
typedef struct dfssm_options {
  size_t size;
  /* Of a step; 0: one a physical core that the process may use. */
  int threads;
  /* 1: compare only the files' sizes with the manifest, not their hashes. */
  int sizes_only;
  /* 1: the bundle's own library or engine may run, as with DFSSM_TRUST=1: SECURITY.md. */
  int trust;
  /* libonnxruntime.so; NULL: $DFSSM_ONNXRUNTIME, else the system's. The first that is opened serves the process. */
  const char* onnxruntime;
  /* libdfssm_ort_cpu.so, of target trt libdfssm_trt.so; NULL: $DFSSM_ORT_LIBRARY or $DFSSM_TRT_LIBRARY, else the
   * bundle's own where it is trusted, else the one beside libdfssm_runtime.so. */
  const char* kernels;
} dfssm_options;

/* How the next token is chosen; begin as with dfssm_options. Zeros are the defaults: greedy. The filters apply in this
 * order. */
typedef struct dfssm_sampling {
  size_t size;
  double temperature; /* 0: the largest logit, the first of equals */
  int64_t top_k;      /* keep the k largest; 0: all */
  double top_p;       /* keep the smallest set of largest tokens whose probability reaches p; 0 or 1: all */
  double min_p;       /* keep the tokens at least p times as probable as the most probable one; 0: all */
  /* 0: another draw every time. 1: it depends on `seed` and the number of tokens read alone. */
  int seeded;
  uint64_t seed;
} dfssm_sampling;

DFSSM_API const char* dfssm_version(void);
/* Of this thread's last call that failed; valid until its next call that fails. "" before one. */
DFSSM_API const char* dfssm_last_error(void);

/* `options` NULL: the defaults. */
DFSSM_API dfssm_status dfssm_engine_open(const char* folder, const dfssm_options* options,
                                         dfssm_engine** engine);
DFSSM_API void dfssm_engine_free(dfssm_engine* engine);
DFSSM_API int64_t dfssm_vocab_size(const dfssm_engine* engine);
DFSSM_API const char* dfssm_model(
    const dfssm_engine* engine); /* sha256 of the weights: identity of the model */
DFSSM_API const char* dfssm_manifest(const dfssm_engine* engine); /* the text of manifest.json */
/* Whether `token` ends a text: an id of the model's eos_token_id, else the tokenizer's <|endoftext|>. */
DFSSM_API int dfssm_is_end(const dfssm_engine* engine, int64_t token);

/* A state that has read nothing. */
DFSSM_API dfssm_status dfssm_state_new(const dfssm_engine* engine, dfssm_state** state);
DFSSM_API void dfssm_state_free(dfssm_state* state);
DFSSM_API dfssm_status dfssm_state_clone(const dfssm_state* state, dfssm_state** copy);
/* `state` becomes `source`, of the same model, in place. */
DFSSM_API dfssm_status dfssm_state_copy(dfssm_state* state, const dfssm_state* source);
DFSSM_API dfssm_status dfssm_state_reset(dfssm_state* state);
/* A .safetensors file, the same bytes as Python's State.save: written whole or not at all. */
DFSSM_API dfssm_status dfssm_state_save(const dfssm_state* state, const char* path);
/* A file that dfssm_state_save or Python's State.save wrote, of one sequence. */
DFSSM_API dfssm_status dfssm_state_load(const dfssm_engine* engine, const char* path, dfssm_state** state);
DFSSM_API int64_t dfssm_state_tokens(const dfssm_state* state); /* how many it has read */
/* f32[vocab_size] after the last token read; written by the next run. */
DFSSM_API const float* dfssm_state_logits(const dfssm_state* state);

/* Read a prompt of `count` >= 1 tokens, after what the state has read before. */
DFSSM_API dfssm_status dfssm_prefill(dfssm_state* state, const int64_t* ids, size_t count);
/* Read one token. */
DFSSM_API dfssm_status dfssm_step(dfssm_state* state, int64_t token);
/* The token that comes after what the state has read; it is not read yet. `sampling` NULL: greedy. */
DFSSM_API dfssm_status dfssm_sample(const dfssm_state* state, const dfssm_sampling* sampling, int64_t* token);
/* The same from other logits, f32[count], after `position` tokens: those of a state, changed by the caller. */
DFSSM_API dfssm_status dfssm_sample_logits(const float* logits, size_t count, int64_t position,
                                           const dfssm_sampling* sampling, int64_t* token);

/* Text needs a library built with DFSSM_TOKENIZERS, else DFSSM_UNSUPPORTED, and a bundle with a tokenizer.json. */
DFSSM_API int dfssm_has_text(void);
/* Writes the first `capacity` ids of the text, and to `count` how many it has. `begins`: with the special tokens that
 * the tokenizer's template puts where a text begins. */
DFSSM_API dfssm_status dfssm_encode(const dfssm_engine* engine, const char* text, size_t length, int begins,
                                    int64_t* ids, size_t capacity, size_t* count);
/* A text that goes on from what `state` has read. */
DFSSM_API dfssm_status dfssm_text_new(const dfssm_state* state, dfssm_text** text);
DFSSM_API void dfssm_text_free(dfssm_text* text);
/* The characters that are complete with `token`, often none, special tokens left out: `length` bytes, valid until the
 * next call on `text`, with a NUL behind them. */
DFSSM_API dfssm_status dfssm_text_push(dfssm_text* text, int64_t token, const char** piece, size_t* length);
/* What is held back when the text ends: bytes that never became a character, as U+FFFD. */
DFSSM_API dfssm_status dfssm_text_flush(dfssm_text* text, const char** piece, size_t* length);

#ifdef __cplusplus
}
#endif
#endif
