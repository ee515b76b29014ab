// The dashboard: asks the gateway every second, and shows what changed between the answers.

const EVERY = 1000, PATIENCE = 5000; // ms
const KEPT = 600, RATES_OVER = 5, RATIOS_OVER = 10; // s
const SCAN_END = "18446744073709551615";
const MOST_ROWS = 10;

const $ = (id) => document.getElementById(id);
const past = []; // points, of the last ten minutes; one without values where the gateway did not answer
let lately = [];      // answers of the last seconds, to take differences from
let keys = { cursor: "0", found: new Map(), last: new Map() };
let token = null, since = null, has = { l2: false };

// ---- from two answers to a point ----

function grown(now, before, counter) {
  return Math.max(0, now.counters[counter] - before.counters[counter]);
}

function ratio(part, whole) {
  return whole > 0 ? part / whole : null;
}

// Within a bucket, observations are taken to lie evenly.
function quantile(now, before, histogram, share) {
  const counts = now.histograms[histogram].slice(0, -1).map((count, at) => Math.max(0, count - before.histograms[histogram][at]));
  const all = counts.reduce((a, b) => a + b, 0);
  let seen = 0;
  for (let at = 0; at < counts.length; at++) {
    if (all && seen + counts[at] >= share * all) {
      const low = at ? now.bounds[at - 1] : 0, high = now.bounds[Math.min(at, now.bounds.length - 1)];
      return low + (high - low) * Math.max(0, share * all - seen) / counts[at];
    }
    seen += counts[at];
  }
  return null;
}

function redisErrors(answer) {
  return Object.entries(answer.counters).reduce((sum, [name, count]) => sum + (name.startsWith("l2_error_") ? count : 0), 0);
}

// The answer of so many seconds ago; the one before the last, where answers are slow to come.
function back(seconds) {
  const before = lately.slice(0, -1), until = lately[lately.length - 1].at;
  return before.find((answer) => until - answer.at <= seconds + 0.5) || before[before.length - 1];
}

function pointOf(now) {
  const near = back(RATES_OVER), far = back(RATIOS_OVER), seconds = now.at - near.at;
  const rate = (counter) => grown(now, near, counter) / seconds;
  const l1 = grown(now, far, "l1_hits"), l2 = grown(now, far, "l2_hits");
  const lookups = l1 + grown(now, far, "l1_misses");
  return {
    time: Date.now() / 1000,
    ratioAll: ratio(l1 + l2, lookups),
    ratioL1: ratio(l1, lookups),
    ratioL2: ratio(l2, l2 + grown(now, far, "l2_misses")),
    l1: rate("l1_hits"), l2: rate("l2_hits"), joined: rate("coalesced"), called: rate("computations"),
    lookups: rate("l1_hits") + rate("l1_misses"),
    l1Half: quantile(now, far, "l1", 0.5), l1Most: quantile(now, far, "l1", 0.99),
    l2Half: quantile(now, far, "l2", 0.5), l2Most: quantile(now, far, "l2", 0.99),
    callHalf: quantile(now, far, "compute", 0.5), callMost: quantile(now, far, "compute", 0.99),
    memory: now.l1.used_bytes, limit: now.l1.memory_bytes,
    promptTokens: rate("prompt_tokens_saved"), answerTokens: rate("completion_tokens_saved"),
    secondsSaved: rate("microseconds_saved") / 1e6,
    failed: rate("compute_errors"), redisFailed: (redisErrors(now) - redisErrors(near)) / seconds,
    stale: rate("stale_error"),
  };
}

// ---- what is shown ----

const perSecond = (value) => `${compact(value)}/s`;
const rates = { text: perSecond, tick: (value) => compact(value, 1e3), scale: linearScale };
const nowhere = (values) => values.length === 0;
const zero = (values) => values.every((value) => value === 0);
const hasL2 = () => has.l2;

const CURVES = [
  { id: "ratio", title: "Hit ratio by tier", note: "of look-ups, over 10 s", unit: "share of look-ups", none: "no look-ups in this time",
    text: percent, tick: (value) => `${value * 100} %`, scale: shareScale, isNothing: nowhere, series: [
      { name: "both tiers", ink: "violet", thin: true, of: (point) => point.ratioAll, isShown: hasL2 },
      { name: "L1, shared memory", ink: "blue", of: (point) => point.ratioL1 },
      { name: "L2, Redis", ink: "teal", of: (point) => point.ratioL2, isShown: hasL2 }] },
  { ...rates, id: "requests", title: "Requests", note: "by what answered, over 5 s", unit: "requests/s", none: "no requests in this time",
    stacked: true, isNothing: zero, series: [
      { name: "L1", ink: "blue", of: (point) => point.l1 },
      { name: "L2", ink: "teal", of: (point) => point.l2, isShown: hasL2 },
      { name: "another's call", ink: "violet", of: (point) => point.joined },
      { name: "upstream", ink: "amber", of: (point) => point.called }] },
  { id: "latency", title: "Latency", note: "over 10 s", unit: "time, logarithmic", none: "nothing was timed in this time",
    text: duration, tick: duration, isNothing: nowhere,
    scale: (top, bottom) => logScale(Number.isFinite(bottom) ? bottom : 1e-6, top || 1), series: [
      { name: "L1 p50", ink: "blue", thin: true, of: (point) => point.l1Half },
      { name: "L1 p99", ink: "blue", of: (point) => point.l1Most },
      { name: "L2 p50", ink: "teal", thin: true, of: (point) => point.l2Half, isShown: hasL2 },
      { name: "L2 p99", ink: "teal", of: (point) => point.l2Most, isShown: hasL2 },
      { name: "upstream p50", ink: "amber", thin: true, of: (point) => point.callHalf },
      { name: "upstream p99", ink: "amber", of: (point) => point.callMost }] },
  { id: "memory", title: "Memory of L1", note: "the whole host's", unit: "bytes", none: "", text: bytes, tick: bytes,
    scale: byteScale, isNothing: () => false, series: [
      { name: "used", ink: "blue", filled: true, of: (point) => point.memory },
      { name: "limit", ink: "grey", thin: true, of: (point) => point.limit }] },
  { ...rates, id: "tokens", title: "Tokens saved", note: "of answers from the cache, over 5 s", unit: "tokens/s", none: "none were saved in this time",
    stacked: true, isNothing: zero, series: [
      { name: "prompt", ink: "teal", of: (point) => point.promptTokens },
      { name: "answer", ink: "violet", of: (point) => point.answerTokens }] },
  { ...rates, id: "seconds", title: "Time saved", note: "that the upstream had taken, over 5 s", unit: "seconds saved each second",
    none: "none was saved in this time", text: (value) => `${compact(value)} s/s`, isNothing: zero, series: [
      { name: "upstream time", ink: "teal", filled: true, of: (point) => point.secondsSaved }] },
  { ...rates, id: "errors", title: "Errors", note: "over 5 s", unit: "errors/s", none: "none in this time", isNothing: zero, series: [
      { name: "upstream", ink: "red", filled: true, of: (point) => point.failed },
      { name: "Redis", ink: "violet", of: (point) => point.redisFailed, isShown: hasL2 },
      { name: "answered stale", ink: "amber", of: (point) => point.stale }] },
];

const charts = CURVES.map((spec) => new TimeChart($("charts"), spec));
const workerBars = new BarChart($("charts"), { id: "workers", title: "Workers", note: "share of look-ups, over 10 s", none: "no look-ups in this time", ink: "blue" });
const keyBars = new BarChart($("charts"), { id: "keys", title: "Top keys", note: "hashes; how often asked for lately, an estimate", none: "nothing is stored yet", ink: "violet", isKey: true });

function tiles(now, point) {
  const of = (counter) => now.counters[counter];
  const lookups = of("l1_hits") + of("l1_misses"), all = ratio(of("l1_hits") + of("l2_hits"), lookups);
  const known = (value, text) => (value === null || value === undefined ? "–" : text(value));
  return [
    ["Hit ratio", known(point && point.ratioAll, percent), `${known(all, percent)} in all`],
    ["Look-ups", known(point && point.lookups, perSecond), `${compact(lookups)} in all`],
    ["L1 latency, p99", known(point && point.l1Most, duration), `p50 ${known(point && point.l1Half, duration)}`],
    ["Upstream, p50", known(point && point.callHalf, duration), `${many(of("computations"), "call")} in all`],
    ["Memory of L1", percent(now.l1.used_bytes / now.l1.memory_bytes), now.l1.entries === 1 ? "1 entry" : `${compact(now.l1.entries)} entries`],
    ["Tokens saved", compact(of("prompt_tokens_saved") + of("completion_tokens_saved")), `${compact(of("completion_tokens_saved"))} of answers`],
    ["Time saved", duration(of("microseconds_saved") / 1e6), "of upstream calls"],
    ["Upstream errors", compact(of("compute_errors")), known(ratio(of("compute_errors"), of("computations")), (share) => `${percent(share)} of calls`), point && point.failed > 0],
  ];
}

function showTiles(rows) {
  $("tiles").replaceChildren();
  for (const [label, value, more, isBad] of rows) {
    const tile = element($("tiles"), "div");
    element(tile, "dt", {}, label);
    element(tile, "dd", { class: isBad ? "value bad" : "value" }, value);
    element(tile, "dd", { class: "more" }, more);
  }
}

function workersOf(now) {
  if (lately.length < 2) return [];
  const far = back(RATIOS_OVER), before = new Map(far.workers.map((worker) => [worker.pid, worker.lookups]));
  const found = now.workers.filter((worker) => before.has(worker.pid))
    .map((worker) => ({ pid: worker.pid, count: Math.max(0, worker.lookups - before.get(worker.pid)) }))
    .filter((worker) => worker.count > 0).sort((a, b) => b.count - a.count || a.pid - b.pid);
  const all = found.reduce((sum, worker) => sum + worker.count, 0), seconds = now.at - far.at;
  const row = (name, count) => ({ name, share: count / all, text: percent(count / all), more: perSecond(count / seconds) });
  const rows = found.slice(0, MOST_ROWS).map((worker) => row(`process ${worker.pid}`, worker.count));
  const others = found.slice(MOST_ROWS);
  if (others.length) rows.push(row(`${others.length} others`, others.reduce((sum, worker) => sum + worker.count, 0)));
  return rows;
}

// The gateway looks at a piece of the slab for each answer; here the pieces become a whole.
function takeKeys(piece) {
  for (const [key, frequency] of piece.found) keys.found.set(key, frequency);
  if (keys.found.size > 8 * MOST_ROWS) keys.found = new Map(hottest(keys.found, 4 * MOST_ROWS));
  keys.cursor = piece.next;
  if (piece.next === SCAN_END) keys = { cursor: "0", found: new Map(), last: keys.found };
}

function hottest(found, count) {
  return [...found].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)).slice(0, count);
}

function redraw() {
  if (past.length === 0) return;
  const until = past[past.length - 1].time;
  const from = Math.max(until - Number($("window").value), Math.min(past[0].time, until - 60));
  const shown = past.filter((point) => point.time >= from);
  for (const chart of charts) chart.show(shown, from, until);
}

// ---- asking ----

function remember(point) {
  past.push(point);
  while (point.time - past[0].time > KEPT) past.shift();
}

function take(now) {
  const last = lately[lately.length - 1];
  if (last && last.slab !== now.slab) { // another slab under the same name: it begins at 0
    lately = [];
    keys = { cursor: "0", found: new Map(), last: new Map() };
    remember({ time: Date.now() / 1000 });
  }
  if (lately.length && now.at <= lately[lately.length - 1].at) return;
  lately.push(now);
  lately = lately.filter((answer) => now.at - answer.at <= RATIOS_OVER + 2);
  has.l2 = now.l2 !== null;
  takeKeys(now.keys);
  const point = lately.length > 1 ? pointOf(now) : null;
  if (point) remember(point);
  $("name").textContent = now.name;
  $("about").replaceChildren();
  for (const part of [
    `version ${now.version}`, `slab made ${duration(Math.max(0, now.age))} ago`,
    now.attached === 1 ? "1 process" : `${now.attached} processes`, now.l2 ? `Redis: ${redisText(now.l2)}` : "no Redis",
  ]) {
    element($("about"), "span", {}, part);
    $("about").append(" ");
  }
  showTiles(tiles(now, point));
  workerBars.show(workersOf(now));
  const hot = hottest(new Map([...keys.last, ...keys.found]), MOST_ROWS);
  keyBars.show(hot.map(([name, frequency]) => ({ name, share: frequency / (hot[0][1] || 1), text: String(frequency), more: "" })));
  redraw();
}

function redisText(l2) {
  const state = l2.breaker.startsWith("open") ? "left alone after failures" : "in use";
  const size = l2.entries === null ? "" : `, about ${compact(l2.entries)} entries`;
  return state + size + (l2.undelivered ? ", invalidations to be delivered" : "");
}

function say(state, text) {
  document.body.dataset.is = $("state").dataset.is = state;
  $("state").textContent = text;
}

function lose(reason) {
  since = since || Date.now() / 1000;
  lately = [];
  if (past.length) {
    remember({ time: Date.now() / 1000 });
    redraw();
  }
  say("lost", `${reason} since ${clock(since)}; trying again`);
}

async function ask() {
  const headers = token === null ? {} : { Authorization: `Bearer ${token}` };
  let reply;
  try {
    reply = await fetch(`admin/stats?cursor=${keys.cursor}`, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (reply.ok) {
      take(await reply.json());
      since = null;
      say("live", "live");
      return true;
    }
  } catch (error) {
    if (error instanceof TypeError || error.name === "TimeoutError" || error.name === "AbortError") lose("The gateway cannot be reached");
    else { lose("The page failed"); console.error(error); }
    return true;
  }
  if (reply.status === 401) { askForToken(); return false; }
  const body = await reply.json().catch(() => ({}));
  lose(body.error ? `Refused: ${body.error.message},` : `The gateway answers ${reply.status}`);
  return true;
}

async function poll() {
  if (await ask()) setTimeout(poll, EVERY);
}

// ---- the token: in this page's memory, sent as a header, never part of an address ----

function askForToken() {
  say("asking", "waiting for the token");
  $("refused").textContent = token === null ? "" : "This is not the gateway's token.";
  $("login").hidden = false;
  $("token").focus();
}

function takeToken(text) {
  token = text;
  $("token").value = "";
  if (!/^[\x21-\x7e]+$/.test(text)) { askForToken(); return; } // no header could carry it
  $("login").hidden = true;
  poll();
}

function tokenOfFragment() {
  const match = /^#token=(.+)$/.exec(location.hash);
  if (match === null) return null;
  history.replaceState(null, "", location.pathname + location.search);
  try {
    return decodeURIComponent(match[1]);
  } catch {
    return match[1];
  }
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("token").value) takeToken($("token").value);
});
$("window").addEventListener("change", redraw);
new ResizeObserver(redraw).observe($("charts"));
window.addEventListener("hashchange", () => { token = tokenOfFragment() || token; });
token = tokenOfFragment();
if (token === null) poll();
else takeToken(token);
