"""The planted bugs: what is changed, which program must find it, and what the bug would do."""
# ruff: noqa: E501 -- the texts are lines of C, found by their exact wording

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A change of one kernel source."""

    name: str
    file: str
    old: str
    new: str
    #: A program of tests/c, as "variant/program", or "fuzz".
    finder: str
    why: str
    #: Further changes of the same file: what is replaced, by what.
    also: tuple[tuple[str, str], ...] = ()


MUTANTS = [
    # ---- the order of stores that lets readers do without a lock (index.h) ----
    Mutant(
        "fence dropped between unlinking and reuse",
        "index.c",
        "    lec_fence_release();                                    /* U3 */\n",
        "",
        "weak/test_weakmem",
        "the thread that unlinks reuses the memory before its version store is visible: readers return foreign bytes; "
        "x86 never shows it, the simulated machine does",
    ),
    Mutant(
        "fence dropped after taking the lock",
        "shard.c",
        "    lec_fence_release();\n    if (atomic_load_explicit(&view->shard->epoch",
        "    if (atomic_load_explicit(&view->shard->epoch",
        "weak/test_weakmem",
        "another thread fills units before readers can see that they were unlinked; invisible on x86",
    ),
    Mutant(
        "reader's acquire fence dropped",
        "read.c",
        "    lec_fence_acquire();\n    return atomic_load_explicit(&bucket->control",
        "    return atomic_load_explicit(&bucket->control",
        "weak/test_weakmem",
        "the second look at the version may be satisfied before the copy; invisible on x86",
    ),
    Mutant(
        "slot published with a relaxed store",
        "index.c",
        "slots[slot % LEC_SLOTS_PER_BUCKET], word, memory_order_release);",
        "slots[slot % LEC_SLOTS_PER_BUCKET], word, memory_order_relaxed);",
        "weak/test_weakmem",
        "a reader finds the entry before its bytes; invisible on x86",
    ),
    Mutant(
        "version not bumped when a slot changes",
        "index.c",
        "    control_add(bucket_of(view, slot), LEC_VERSION_ONE);    /* U2 */\n",
        "",
        "weak/test_weakmem",
        "a reader cannot tell that what it copied was given away",
    ),
    Mutant(
        "second look at the control word dropped",
        "read.c",
        "    return atomic_load_explicit(&bucket->control, memory_order_relaxed) == control;",
        "    (void)bucket;\n    (void)control;\n    return true;",
        "plain/test_threads",
        "torn values are returned",
    ),
    Mutant(
        "memory freed before the unlink",
        "write.c",
        "    lec_index_replace_locked(view, write->slot, lec_slot_word(lec_hash_tag(write->hash), write->unit));\n    node_write_locked",
        "    enum lec_space_status given = lec_chain_give(&view->space, old_unit);\n"
        "    lec_index_replace_locked(view, write->slot, lec_slot_word(lec_hash_tag(write->hash), write->unit));\n    node_write_locked",
        "points/test_crash",
        "free-run links are written into an entry that readers still find: a death there leaves it so",
        (
            (
                "    return updated == LEC_POLICY_OK && lec_chain_give(&view->space, old_unit) == LEC_SPACE_OK ?",
                "    return updated == LEC_POLICY_OK && given == LEC_SPACE_OK ?",
            ),
        ),
    ),
    Mutant(
        "published before the payload is written",
        "write.c",
        "    return payload_write(write) ? publish_locked(write) : LEC_DAMAGED;\n}\n\n/* Second",
        "    status = publish_locked(write);\n    return payload_write(write) ? status : LEC_DAMAGED;\n}\n\n/* Second",
        "points/test_crash",
        "a death in between leaves garbage under a published key",
    ),
    Mutant(
        "overflow count not incremented",
        "index.c",
        "    control_add(&view->buckets[home], 1);\n",
        "",
        "plain/test_model",
        "an entry in its alternate bucket is never found",
    ),
    # ---- whose value is it ----
    Mutant(
        "reader compares the first 8 bytes of a key only",
        "read.c",
        "return lec_equal(payload_at(reading, seen), reading->key, reading->key_bytes);",
        "return lec_equal(payload_at(reading, seen), reading->key, reading->key_bytes < 8 ? reading->key_bytes : 8);",
        "plain/test_model",
        "another key's value is returned when tags collide",
    ),
    Mutant(
        "writer compares the tag only",
        "index.c",
        "&& lec_chain_equals(&view->space, unit, key, key_bytes);",
        "&& (key != NULL);",
        "plain/test_model",
        "a set overwrites, a delete removes another key",
    ),
    Mutant(
        "version of cas not compared",
        "write.c",
        "write->slot != LEC_NONE && lec_load64(&present(write)->version) == store->expected ? LEC_OK : LEC_MISMATCH;",
        "write->slot != LEC_NONE ? LEC_OK : LEC_MISMATCH;",
        "plain/test_model",
        "two compare-and-sets of one version both succeed",
    ),
    Mutant(
        "token not voided by a delete",
        "write.c",
        "    lec_token_void_locked(&write->view, write->hash);   /* of an absent key too: a fill that began before must not bring it back */\n",
        "",
        "plain/test_model",
        "a fill that began before a delete brings the old value back",
    ),
    Mutant(
        "tokens not voided by recovery",
        "recover.c",
        "lec_put32(&view->generations[at], lec_load32(&view->generations[at]) + 1);",
        "lec_put32(&view->generations[at], lec_load32(&view->generations[at]));",
        "points/test_crash",
        "a writer died between publishing and voiding: an older fill replaces what others have read",
    ),
    # ---- time and clear ----
    Mutant(
        "clear epoch not checked by readers",
        "read.c",
        "    if (lec_load32(&entry->epoch) != reading->epoch || ",
        "    if (",
        "points/test_stopped",
        "keys outlive clear() in shards whose lock could not be had",
    ),
    Mutant(
        "expiry ignored by readers",
        "read.c",
        "    if (seen->expires_at <= reading->now_ns) return true;\n",
        "",
        "plain/test_model",
        "expired values are returned",
    ),
    Mutant(
        "expiry bound not lowered on touch",
        "write.c",
        "    lec_expiry_note_locked(&write->view, write->node, "
        "lec_expiry_deadline_locked(&write->view, write->node));\n",
        "",
        "plain/test_model",
        "expired memory is never found again",
    ),
    # ---- memory ----
    Mutant(
        "old units freed twice on replace",
        "write.c",
        "    return updated == LEC_POLICY_OK && lec_chain_give(&view->space, old_unit) == LEC_SPACE_OK ? LEC_OK : LEC_DAMAGED;",
        "    (void)lec_chain_give(&view->space, old_unit);\n"
        "    return updated == LEC_POLICY_OK && lec_chain_give(&view->space, old_unit) == LEC_SPACE_OK ? LEC_OK : LEC_DAMAGED;",
        "plain/test_model",
        "the same units could be handed out to two keys",
    ),
    Mutant(
        "node given back twice",
        "room.c",
        "    lec_node_give_locked(view, node);\n    count_leaving",
        "    lec_node_give_locked(view, node);\n    lec_node_give_locked(view, node);\n    count_leaving",
        "plain/test_model",
        "two entries share one node",
    ),
    Mutant(
        "payload bytes not taken off on delete",
        "room.c",
        "    counters_drop(view, entry);\n",
        "    (void)counters_drop;\n    (void)entry;\n",
        "plain/test_model",
        "the counters drift",
    ),
    # ---- death and recovery ----
    Mutant(
        "dead owner's shard not rebuilt",
        "shard.c",
        "    if (error == EOWNERDEAD) adopt_from_dead_owner(view);\n",
        "    if (error == EOWNERDEAD) pthread_mutex_consistent(view->mutex);\n",
        "points/test_crash",
        "half-done changes stay",
    ),
    Mutant(
        "lock consistent and free before the sweep",
        "shard.c",
        "    lec_shard_recover_locked(view);\n    lec_stat_add_locked(view, LEC_STAT_RECOVERIES, 1);\n    pthread_mutex_consistent(view->mutex);\n",
        "    pthread_mutex_consistent(view->mutex);\n    pthread_mutex_unlock(view->mutex);\n    pthread_mutex_lock(view->mutex);\n"
        "    lec_shard_recover_locked(view);\n    lec_stat_add_locked(view, LEC_STAT_RECOVERIES, 1);\n",
        "points/test_recovery",
        "a recoverer that dies leaves a shard that nobody recovers (consistent alone, with the lock kept, is the same as before: "
        "a death still says so to the next owner)",
    ),
    Mutant(
        "readers not invalidated by recovery",
        "recover.c",
        "    lec_index_invalidate_readers_locked(view);\n",
        "",
        "points/test_stopped",
        "killed between slot and version: a stopped reader validates a copy of memory that was given away",
    ),
    Mutant(
        "reservations of live owners forgotten as roots",
        "reserve.c",
        "    bool held = owner_lives && state_of(reservation) == LEC_RESERVATION_HELD && unit < space->units;\n",
        "    bool held = false;\n    (void)owner_lives;\n",
        "points/test_stopped",
        "a stopped writer's late stores land in another key's value",
    ),
    Mutant(
        "reservations of live owners reaped",
        "reserve.c",
        "    if (owner_lives && state_of(reservation) == LEC_RESERVATION_HELD) return;\n",
        "    (void)owner_lives;\n",
        "points/test_stopped",
        "as above, without any death",
    ),
    Mutant(
        "moved entry's second copy kept by recovery",
        "recover.c",
        "        if (lec_slot_load(view, at) == word) return true;\n",
        "        if (lec_slot_load(view, at) == word) return false;\n",
        "points/test_crash",
        "the proof that every unit is reached once fails, and a sound shard is cleared",
    ),
    Mutant(
        "statistics zeroed when a record is adopted",
        "process.c",
        "        drop_claims(process);\n        handle->process",
        "        drop_claims(process);\n"
        "        for (uint32_t at = 0; at < LEC_STAT_COUNT; at++) atomic_store(&process->stats[at], 0);\n        handle->process",
        "points/test_crash",
        "host-wide totals fall",
    ),
    Mutant(
        "next version not restored by recovery",
        "recover.c",
        "    if (shard->next_version <= salvage->highest_version || shard->next_version >= VERSION_LIMIT) shard->next_version = salvage->highest_version + 1;\n",
        "    shard->next_version = 1;\n",
        "points/test_crash",
        "versions repeat: a stale cas succeeds",
    ),
    # ---- arbitrary bytes ----
    Mutant(
        "first unit of a chain not bounded",
        "read.c",
        "    if (unit >= reading->space.units) return false;\n",
        "",
        "fuzz",
        "a scribbled slot makes readers leave the segment",
    ),
    Mutant(
        "extent not bounded",
        "chain.c",
        "    uint32_t units = lec_load32(&extent->extent_units);\n    if (!lec_space_holds(space, unit, units)) return false;\n",
        "    uint32_t units = lec_load32(&extent->extent_units);\n",
        "fuzz",
        "a scribbled extent makes readers leave the segment",
    ),
    Mutant(
        "node of an entry not bounded",
        "write.c",
        "    if (write->node >= view->node_count || view->nodes",
        "    if (view->nodes",
        "fuzz",
        "a scribbled node number makes writers leave the segment",
    ),
    Mutant(
        "length of a value not bounded",
        "read.c",
        " || seen->value_bytes > reading->handle->config.max_value_bytes) return false;",
        ") return false;",
        "fuzz",
        "a scribbled length asks for gigabytes",
    ),
    # ---- flights (flight.h) ----
    Mutant(
        "takeover without bumping the key's generation",
        "flight.c",
        "    lec_token_void_locked(view, atomic_load_explicit(&flight->key_hash, memory_order_relaxed));\n",
        "    (void)view;\n",
        "plain/test_flights",
        "the fill of a leader that was stopped and replaced brings an older value back",
    ),
    Mutant(
        "owner of a flight stored first",
        "flight.c",
        "    ticket->index = flight_index(view->handle, flight);\n",
        "    ticket->index = flight_index(view->handle, flight);\n"
        "    atomic_store_explicit(&flight->owner, view->handle->identity, memory_order_release);\n",
        "points/test_flight_deaths",
        "a death in between leaves a flight with another one's key and deadline",
        (
            (
                "    atomic_store_explicit(&flight->owner, view->handle->identity, memory_order_release);    /* F2 */\n",
                "",
            ),
        ),
    ),
    Mutant(
        "former owner not cleared by a takeover",
        "flight.c",
        "    if (flight != choice.vacant) {\n        *revoked = flight;\n        revoke_locked(view, flight);\n    }\n",
        "    if (flight != choice.vacant) {\n        *revoked = flight;\n"
        "        lec_token_void_locked(view, choice.seen.key_hash);\n        ring(view->handle, flight);\n    }\n",
        "points/test_flight_deaths",
        "a death in between leaves the former owner with the new one's token",
    ),
    Mutant(
        "flight ended without comparing the token",
        "flight.c",
        "        atomic_load_explicit(&(*flight)->fencing_token, memory_order_relaxed) == ticket.token)\n",
        "        ticket.token != 0)\n",
        "plain/test_flights",
        "a call with the ticket of an ended flight ends (renews, advances) the one that has the record now",
    ),
    Mutant(
        "flight ended without comparing the owner",
        "flight.c",
        "    if (atomic_load_explicit(&(*flight)->owner, memory_order_relaxed) == handle->identity &&\n",
        "    if (atomic_load_explicit(&(*flight)->owner, memory_order_relaxed) != 0 &&\n",
        "plain/test_flights",
        "a forked child, or whoever joined, ends its parent's flight",
    ),
    Mutant(
        "wake word moved before the flight is over",
        "flight.c",
        "    atomic_store_explicit(&flight->owner, 0, memory_order_release);     /* F3 */\n    ring(handle, flight);\n",
        "    ring(handle, flight);\n    atomic_store_explicit(&flight->owner, 0, memory_order_release);\n",
        "points/test_flight_deaths",
        "a waiter that looks in between sleeps on the moved word, and is woken by nobody",
    ),
    Mutant(
        "waiter reads the wake word after its look",
        "flight.c",
        "        int64_t state = lec_flight_state(handle, ticket, now_ns + waited);\n",
        "        int64_t state = lec_flight_state(handle, ticket, now_ns + waited);\n"
        "        seen = atomic_load_explicit(&flight->wake, memory_order_acquire);\n",
        "points/test_flight_deaths",
        "a flight that ends between the two is slept through",
    ),
    Mutant(
        "progress not reset by a claim",
        "flight.c",
        "    atomic_store_explicit(&flight->progress, 0, memory_order_release);\n",
        "",
        "plain/test_flights",
        "a flight begins with the progress of the one before",
    ),
    Mutant(
        "second look at a flight's token dropped",
        "flight.c",
        "    return seen->owner != 0 && seen->token != 0 && atomic_load_explicit(&flight->fencing_token, memory_order_relaxed) == seen->token;\n",
        "    return seen->owner != 0 && seen->token != 0;\n",
        "weak/test_weakflights",
        "the progress of a later flight is taken for the one that was asked for",
    ),
    Mutant(
        "new token stored with a relaxed store",
        "flight.c",
        "    atomic_store_explicit(&flight->fencing_token, ticket->token, memory_order_release);\n",
        "    atomic_store_explicit(&flight->fencing_token, ticket->token, memory_order_relaxed);\n",
        "weak/test_weakflights",
        "who looks sees the new token beside the former owner: it joins another key's flight; invisible on x86",
    ),
    Mutant(
        "new key of a flight stored with a relaxed store",
        "flight.c",
        "    atomic_store_explicit(&flight->key_hash, hash, memory_order_release);\n",
        "    atomic_store_explicit(&flight->key_hash, hash, memory_order_relaxed);\n",
        "weak/test_weakflights",
        "the second look at the token may be older than the key: a caller joins another key's flight; invisible on x86",
    ),
    Mutant(
        "index of a ticket not bounded",
        "regions.c",
        "    return index < handle->geometry.flight_count ? (struct lec_flight",
        "    return index != UINT32_MAX ? (struct lec_flight",
        "fuzz",
        "a ticket from elsewhere makes its user leave the segment",
    ),
    # ---- reads leave no trace ----
    Mutant(
        "every hit stores a touch",
        "read.c",
        "    if (touches < LEC_TOUCH_MAX) atomic_store",
        "    if (touches <= LEC_TOUCH_MAX) atomic_store",
        "points/test_readside",
        "a hot key's line bounces between all processes",
    ),
    # ---- the ring of samples ----
    Mutant(
        "events that were overwritten while they were copied are kept",
        "samples.c",
        "    copy->event_count -= lost;\n",
        "    lost = 0;\n",
        "plain/test_samples",
        "a history has events of a later time in the middle, and those before them twice",
    ),
    Mutant(
        "a cleared shard goes on with its ring",
        "shard.c",
        "    lec_samples_restart(&view->policy.samples);\n",
        "",
        "plain/test_samples",
        "the answer is about keys that were cleared away",
    ),
    Mutant(
        "a damaged count of samples is not repaired",
        "recover.c",
        "    lec_samples_repair(&view->policy.samples);\n",
        "",
        "plain/test_samples",
        "the checker complains of the same shard for ever",
    ),
    Mutant(
        "an expired key is a hit in the replay",
        "miniature.c",
        "    if (!is_dead(miniature, &miniature->policy.nodes[held - 1u], at_ns)) return held - 1u;\n",
        "    return held - 1u;\n",
        "plain/test_samples",
        "larger sizes are told to be better than a short life lets them be",
    ),
    Mutant(
        "what is larger than the cache is let in",
        "miniature.c",
        "    if (units > miniature->policy.total_units) return;\n",
        "",
        "plain/test_samples",
        "an event of damaged size empties the whole cache that it is replayed to",
    ),
    # ---- the policy where memory is short ----
    Mutant(
        "what one eviction freed too many is filled without a contest",
        "policy.c",
        "    uint64_t slack = !view->state->is_memory_short ? 0u : units > spare ? units : spare;\n",
        "    uint64_t slack = units > spare ? 0u : 0u;\n",
        "plain/test_policy",
        "each eviction that frees more than is needed lets newcomers pass: the main space is a FIFO",
    ),
    Mutant(
        "what a main space of few entries lacks is taken for room",
        "policy.c",
        "    uint64_t slack = !view->state->is_memory_short ? 0u : units > spare ? units : spare;\n",
        "    uint64_t slack = !view->state->is_memory_short ? 0u : spare;\n",
        "plain/test_policy",
        "where a dozen entries fill the memory, every newcomer passes",
    ),
    Mutant(
        "the sketch ages by max_entries where memory is short",
        "policy.c",
        "    return view->state->is_memory_short && live && live < view->max_entries ? live : view->max_entries;\n",
        "    return live ? view->max_entries : view->max_entries;\n",
        "plain/test_policy",
        "with default settings and large values the counters saturate, and every key is as frequent as any",
    ),
    Mutant(
        "a tie is the newcomer's where memory is short",
        "policy.c",
        "    if (!view->state->is_memory_short || !is_larger(hunt, candidate, victim))\n",
        "    if (!view->state->is_memory_short)\n",
        "plain/test_policy",
        "a scan of values that are alike empties the main space",
    ),
    Mutant(
        "a sweep of the sketch begins again before it has ended",
        "sketch.c",
        " && aging->cursor >= sketch->lines) {",
        ") {",
        "plain/test_policy",
        "with large values the last lines are never halved: keys that fall there win every contest",
    ),
    Mutant(
        "looks that do not fill a set are lost",
        "shadow.c",
        "        shadow->cursor = cursor + *looks;\n",
        "        shadow->cursor = cursor;\n",
        "plain/test_policy",
        "in large caches, where few keys are looked at per insert, no hit is ever found by polling",
    ),
    Mutant(
        "an insert polls as long as it finds hits",
        "policy.c",
        "extra < POLLS_FOR_HITS_MOST && (set = lec_shadow_next",
        "(set = lec_shadow_next",
        "plain/test_policy",
        "where every key is hot, one insert deals with all sampled keys, under the lock",
    ),
    Mutant(
        "an incumbent that won stays at the tail",
        "policy.c",
        "        move_to_head(hunt, victim, lec_node_list(&view->nodes[victim]));\n    return candidate;\n",
        "        (void)victim;\n    return candidate;\n",
        "plain/test_policy",
        "one strong entry shields all the weak ones behind it",
    ),
    Mutant(
        "a stale main space holds out",
        "policy.c",
        "    return view->state->is_memory_short && view->state->large_losses >= STALE_LOSSES;\n",
        "    return view->state->large_losses > UINT32_MAX - STALE_LOSSES;\n",
        "plain/test_policy",
        "small entries that nobody asks for keep larger traffic out for many turnovers",
    ),
    Mutant(
        "a main space in use is taken for a stale one",
        "policy.c",
        "        view->state->large_losses = 0;\n}",
        "        view->state->large_losses += 0;\n}",
        "plain/test_policy",
        "large values that pass once push out what is asked for all the time",
    ),
]
