/* Calls the C interface as lines on stdin say, for the tests: of each what it prints, then "ok" or "error CODE TEXT".
 * There is one engine, a state that is worked on, and another that `keep` makes of it. */
#include <dfssm/runtime.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static dfssm_engine* engine;
static dfssm_state *state, *kept;

static int is(const char* word, const char* name) { return strcmp(word, name) == 0; }

static void make(dfssm_state* made) {
  dfssm_state_free(state);
  state = made;
}

/* The numbers after the command. */
static size_t numbers(int64_t* ids, size_t most) {
  size_t count = 0;
  for (char* word; count < most && (word = strtok(NULL, " ")); ++count) ids[count] = strtoll(word, NULL, 10);
  return count;
}

/* TEMPERATURE TOP_K TOP_P MIN_P SEED, the last of which may be "-". */
static dfssm_sampling sampling(void) {
  dfssm_sampling found = {sizeof found, 0, 0, 0, 0, 0, 0};
  found.temperature = atof(strtok(NULL, " "));
  found.top_k = atoll(strtok(NULL, " "));
  found.top_p = atof(strtok(NULL, " "));
  found.min_p = atof(strtok(NULL, " "));
  const char* seed = strtok(NULL, " ");
  found.seeded = !is(seed, "-");
  found.seed = found.seeded ? strtoull(seed, NULL, 10) : 0;
  return found;
}

static dfssm_status run(const char* command) {
  static int64_t ids[4096];
  dfssm_status status = DFSSM_OK;
  dfssm_state* made = NULL;
  if (is(command, "open")) {
    dfssm_options options = {sizeof options, 0, 0, 0, NULL, NULL};
    const char* folder = strtok(NULL, " ");
    const size_t given = numbers(ids, 2); /* of trust and sizes_only */
    options.trust = given > 0 && ids[0];
    options.sizes_only = given > 1 && ids[1];
    dfssm_state_free(state);
    dfssm_state_free(kept);
    dfssm_engine_free(engine);
    state = kept = NULL;
    engine = NULL;
    status = dfssm_engine_open(folder, &options, &engine);
    return status ? status : dfssm_state_new(engine, &state);
  }
  if (is(command, "prefill")) {
    const size_t count = numbers(ids, 4096);
    return dfssm_prefill(state, ids, count);
  }
  if (is(command, "reset")) return dfssm_state_reset(state);
  if (is(command, "save")) return dfssm_state_save(state, strtok(NULL, " "));
  if (is(command, "load")) {
    status = dfssm_state_load(engine, strtok(NULL, " "), &made);
    if (!status) make(made);
    return status;
  }
  if (is(command, "keep")) return dfssm_state_clone(state, &kept);
  if (is(command, "back")) return dfssm_state_copy(state, kept);
  if (is(command, "generate")) { /* COUNT and the sampling: up to an end */
    long left = atol(strtok(NULL, " "));
    const dfssm_sampling by = sampling();
    int64_t token;
    for (; left > 0 && !(status = dfssm_sample(state, &by, &token)) && !dfssm_is_end(engine, token); --left) {
      printf("%" PRId64 " ", token);
      if ((status = dfssm_step(state, token))) break;
    }
    return status;
  }
  if (is(command,
         "sample")) { /* the sampling, POSITION and a file of f32 logits: one choice for each 1,000 of them */
    const dfssm_sampling by = sampling();
    const int64_t position = atoll(strtok(NULL, " "));
    static float logits[1000];
    FILE* file = fopen(strtok(NULL, " "), "rb");
    for (int64_t token; !status && fread(logits, sizeof logits, 1, file) == 1;) {
      status = dfssm_sample_logits(logits, 1000, position, &by, &token);
      if (!status) printf("%" PRId64 " ", token);
    }
    fclose(file);
    return status;
  }
  if (is(command, "logits")) {
    const float* logits = dfssm_state_logits(state);
    for (int64_t i = 0; i < dfssm_vocab_size(engine); ++i) printf("%a ", logits[i]);
    return status;
  }
  if (is(command, "about")) {
    printf("%s %" PRId64 " %" PRId64, dfssm_model(engine), dfssm_vocab_size(engine),
           dfssm_state_tokens(state));
    return status;
  }
  if (is(command, "ends")) {
    for (int64_t i = 0; i < dfssm_vocab_size(engine); ++i) {
      if (dfssm_is_end(engine, i)) printf("%" PRId64 " ", i);
    }
    return status;
  }
  if (is(command, "null")) return dfssm_state_new(NULL, &state);
  abort();
}

int main(void) {
  static char line[1 << 16];
  while (fgets(line, sizeof line, stdin)) {
    line[strcspn(line, "\n")] = 0;
    const dfssm_status status = run(strtok(line, " "));
    if (status)
      printf("\nerror %d %s\n", status, dfssm_last_error());
    else
      printf("\nok\n");
    fflush(stdout);
  }
  dfssm_state_free(kept);
  dfssm_state_free(state);
  dfssm_engine_free(engine);
  return 0;
}
