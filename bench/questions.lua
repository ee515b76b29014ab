-- Questions for wrk: those of a file, one a line, in turn; every n-th one is new (0: none is).
--
--   wrk -s questions.lua URL -- FILE N
--
-- A new one is the first of the file with a number of its own in front of its text. Prints its figures as JSON.

local requests, first = {}, nil
local every, sent, run = 0, 0, os.time()

function init(args)
   wrk.method = "POST"
   every = tonumber(args[2])
   for line in io.lines(args[1]) do
      first = first or line
      requests[#requests + 1] = wrk.format(nil, nil, nil, line)
   end
end

function request()
   sent = sent + 1
   if every > 0 and sent % every == 0 then
      local start, stop = first:find('"content":"', 1, true)
      local new = string.format("%s%d-%d %s", first:sub(1, stop), run, sent, first:sub(stop + 1))
      return wrk.format(nil, nil, nil, new)
   end
   return requests[sent % #requests + 1]
end

function done(summary, latency)
   local errors = summary.errors
   print(string.format(
      '{"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "errors": %d}',
      summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
      errors.connect + errors.read + errors.write + errors.timeout + errors.status))
end
