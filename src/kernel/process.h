/* Who is who: process identities, and the per-process records in the segment. */
#ifndef LEC_PROCESS_H
#define LEC_PROCESS_H

#include "kernel.h"

LEC_INTERNAL struct lec_process *lec_process_at(const struct lec_handle *handle, uint32_t index);
/* Claims a record for handle->identity: a dead process's or an unused one; else, and for identity 0 (not known),
 * record 0, which everybody may share. */
LEC_INTERNAL void lec_process_claim(struct lec_handle *handle);

static inline int32_t lec_identity_pid(uint64_t identity) { return (int32_t)(identity >> 40); }

#endif
