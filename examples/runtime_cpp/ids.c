/* Token ids in, token ids out, with libdfssm_runtime in C: the most likely tokens. At the end it tells on stderr what
 * memory the process has, as Linux counts it.
 *
 *   ids BUNDLE COUNT ID...      ids model-ort-cpu 20 17 254 3 */
#include <dfssm/runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(dfssm_status status) {
  if (status == DFSSM_OK) return;
  fprintf(stderr, "ids: %s\n", dfssm_last_error());
  exit(1);
}

static void print_memory(void) {
  char line[256];
  FILE* file = fopen("/proc/self/status", "r");
  while (file && fgets(line, sizeof line, file)) {
    if (!strncmp(line, "Vm", 2) || !strncmp(line, "Rss", 3)) fputs(line, stderr);
  }
  if (file) fclose(file);
}

int main(int count, char** arguments) {
  dfssm_engine* engine = NULL;
  dfssm_state* state = NULL;
  int64_t token, *prompt = calloc(count, sizeof token);
  if (count < 4 || !prompt) {
    fprintf(stderr, "usage: ids BUNDLE COUNT ID...\n");
    return 2;
  }
  check(dfssm_engine_open(arguments[1], NULL, &engine));
  check(dfssm_state_new(engine, &state));
  for (int i = 3; i < count; ++i) prompt[i - 3] = atoll(arguments[i]);
  check(dfssm_prefill(state, prompt, count - 3));
  for (long left = atol(arguments[2]); left > 0; --left) {
    check(dfssm_sample(state, NULL, &token));
    printf("%lld\n", (long long)token);
    check(dfssm_step(state, token));
  }
  print_memory();
  dfssm_state_free(state);
  dfssm_engine_free(engine);
  free(prompt);
}
