-- What wrk sends, `wrk … -s load.lua URL -- METHOD [JSON]`, and what came of it, as JSON in the last line.

function init(args)
  wrk.method = args[1]
  if args[2] then
    wrk.body = args[2]
    wrk.headers['Content-Type'] = 'application/json'
  end
end

function done(summary, latency, requests)
  local errors = 0
  for _, number in pairs(summary.errors) do errors = errors + number end
  print(string.format('{"requests": %d, "microseconds": %d, "errors": %d}', summary.requests, summary.duration, errors))
end
