// tokenizers-cpp's C interface over the package `tokenizers`, the same library in Rust: no registry of Rust packages
// is needed to test with it.
#define PY_SSIZE_T_CLEAN
#include "tokenizers_c.h"

#include <Python.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

struct Handle {
  PyObject* tokenizer;
  std::string text;
};

PyObject* must(PyObject* object) {
  if (object) return object;
  PyErr_Print();
  std::abort();
}

}  // namespace

TokenizerHandle tokenizers_new_from_str(const char* json, size_t len) {
  if (!Py_IsInitialized()) Py_InitializeEx(0);
  PyObject* kind = must(PyObject_GetAttrString(must(PyImport_ImportModule("tokenizers")), "Tokenizer"));
  return new Handle{must(PyObject_CallMethod(kind, "from_str", "s#", json, static_cast<Py_ssize_t>(len))),
                    ""};
}

void tokenizers_encode(TokenizerHandle handle, const char* data, size_t len, int add_special_token,
                       TokenizerEncodeResult* result) {
  PyObject* encode = must(PyObject_GetAttrString(static_cast<Handle*>(handle)->tokenizer, "encode"));
  PyObject* given = must(Py_BuildValue("(s#)", data, static_cast<Py_ssize_t>(len)));
  PyObject* options =
      must(Py_BuildValue("{s:O}", "add_special_tokens", add_special_token ? Py_True : Py_False));
  PyObject* ids = must(PyObject_GetAttrString(must(PyObject_Call(encode, given, options)), "ids"));
  result->len = PyList_Size(ids);
  result->token_ids = new int[result->len];
  for (size_t i = 0; i < result->len; ++i) result->token_ids[i] = PyLong_AsLong(PyList_GetItem(ids, i));
}

void tokenizers_free_encode_results(TokenizerEncodeResult* results, size_t num_seqs) {
  for (size_t i = 0; i < num_seqs; ++i) delete[] results[i].token_ids;
}

void tokenizers_decode(TokenizerHandle handle, const uint32_t* data, size_t len, int skip_special_token) {
  auto* self = static_cast<Handle*>(handle);
  PyObject* ids = must(PyList_New(len));
  for (size_t i = 0; i < len; ++i) PyList_SetItem(ids, i, PyLong_FromUnsignedLong(data[i]));
  PyObject* text = must(
      PyObject_CallMethod(self->tokenizer, "decode", "OO", ids, skip_special_token ? Py_True : Py_False));
  Py_ssize_t size = 0;
  const char* bytes = PyUnicode_AsUTF8AndSize(text, &size);
  self->text.assign(bytes, size);
}

void tokenizers_get_decode_str(TokenizerHandle handle, const char** data, size_t* len) {
  const std::string& text = static_cast<Handle*>(handle)->text;
  *data = text.data();
  *len = text.size();
}

void tokenizers_free(TokenizerHandle handle) { delete static_cast<Handle*>(handle); }
