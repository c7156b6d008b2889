// The part of tokenizers-cpp's C interface that libdfssm_runtime uses.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
typedef void* TokenizerHandle;
typedef struct {
  int* token_ids;
  size_t len;
} TokenizerEncodeResult;

TokenizerHandle tokenizers_new_from_str(const char* json, size_t len);
void tokenizers_encode(TokenizerHandle handle, const char* data, size_t len, int add_special_token,
                       TokenizerEncodeResult* result);
void tokenizers_free_encode_results(TokenizerEncodeResult* results, size_t num_seqs);
void tokenizers_decode(TokenizerHandle handle, const uint32_t* data, size_t len, int skip_special_token);
void tokenizers_get_decode_str(TokenizerHandle handle, const char** data, size_t* len);
void tokenizers_free(TokenizerHandle handle);
#ifdef __cplusplus
}
#endif
