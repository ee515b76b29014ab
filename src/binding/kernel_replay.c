/* The kernel's second unit: the policy once more, for replaying. In kernel.c its functions would have two callers each, and
 * the compiler would not inline them any more into the calls that have to be fast. (There they are static; here not.) */
#include "miniature.c"
#include "policy.c"
#include "samples.c"
#include "shadow.c"
#include "sketch.c"
