-- Find the jobs of dead workers. It only names the runs whose lease ran out: the caller sends a `release` for each,
-- with the run's own fence. If a stock worker was killed after its pop and before the start (rq#2236), the job is in
-- the intermediate list: it goes back to its queue after a minute there, as in RQ's own cleanup.
-- ARGV: queues.
-- Answers a list of {job id, execution id, queue, worker, request id or '', crashes so far, the job's own crash limit
-- or ''}.
local now, expired = clock(), {}
for _, queue in ipairs(ARGV) do
  -- Look at two ranges: scores that RQ counts as over, too, and our leases that ran out, up to GRACE later. Between
  -- them are the runs of live stock workers, and these may be many.
  local wip = registry_key('wip', queue)
  local members = redis.call('ZRANGEBYSCORE', wip, '-inf', exact(now), 'LIMIT', 0, 100)
  local leased = redis.call('ZREVRANGEBYSCORE', wip, exact(now + GRACE), '(' .. exact(now), 'LIMIT', 0, 100)
  for _, member in ipairs(leased) do members[#members + 1] = member end
  for _, member in ipairs(members) do
    local id, execution = string.match(member, '^(.*):(.*)$')
    if not id then
      redis.call('ZREM', wip, member)
    else
      local run = redis.pcall('HMGET', execution_key(id, execution), 'lease_until', 'worker_name')
      if run.err then run = {} end
      -- The run of a stock worker has no lease. Its score is the time at which RQ gives it up.
      local lease_until = number(run[1], tonumber(redis.call('ZSCORE', wip, member)))
      if lease_until < now then
        local job = read(id, 'crashes', 'max_crashes', 'request_id')
        expired[#expired + 1] = {id, execution, queue, run[2] or '', job[3] or '', integer(job[1], 0), job[2] or ''}
      end
    end
  end

  local intermediate = queue_key(queue) .. ':intermediate'
  for _, id in ipairs(redis.call('LRANGE', intermediate, 0, 99)) do
    local first_seen_key = intermediate .. ':first_seen:' .. id
    local status = read(id, 'status')[1]
    if status ~= 'queued' then
      -- If it has started, its stock worker is about to remove the entry. With any other status, the entry is stale.
      if status ~= 'started' then redis.call('LREM', intermediate, 1, id) end
      redis.call('DEL', first_seen_key)
    elseif not redis.call('SET', first_seen_key, exact(now), 'NX', 'EX', 86400)
      and now - number(redis.call('GET', first_seen_key), 0) > 60 then
      redis.call('LREM', intermediate, 1, id)
      redis.call('DEL', first_seen_key)
      make_waiting(id, status, queue, true, now)
    end
  end
end
return expired
