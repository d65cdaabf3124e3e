-- What dead workers left behind. The jobs whose lease ran out are only named: the worker releases each, with the fence
-- of its execution. A job that a stock worker left in its intermediate list, popped but never started (rq#2236), goes
-- back to its queue once it has been seen there for a minute, as RQ counts it.
-- ARGV: queues.
-- Answers a list of {job id, execution id, queue, worker, request id or '', crashes so far, the job's own crash limit or ''}.
local now, expired = clock(), {}
for _, queue in ipairs(ARGV) do
  -- From both ends: the runs of live stock workers, which may be many, stand between what is over for RQ too and our
  -- leases that ran out.
  local wip = registry('wip', queue)
  local members = redis.call('ZRANGEBYSCORE', wip, '-inf', exact(now), 'LIMIT', 0, 100)
  local ours = redis.call('ZREVRANGEBYSCORE', wip, exact(now + GRACE), '(' .. exact(now), 'LIMIT', 0, 100)
  for _, member in ipairs(ours) do members[#members + 1] = member end
  for _, member in ipairs(members) do
    local id, execution = string.match(member, '^(.*):(.*)$')
    if not id then
      redis.call('ZREM', wip, member)
    else
      local run = redis.pcall('HMGET', execution_key(id, execution), 'lease_until', 'worker_name')
      if run.err then run = {} end
      -- A stock worker's execution has no lease of ours; its score is when RQ would give it up.
      local ends = number(run[1], tonumber(redis.call('ZSCORE', wip, member)))
      if ends < now then
        local job = read(id, 'crashes', 'max_crashes', 'request_id')
        expired[#expired + 1] = {id, execution, queue, run[2] or '', job[3] or '', whole(job[1], 0), job[2] or ''}
      end
    end
  end

  local intermediate = queue_key(queue) .. ':intermediate'
  for _, id in ipairs(redis.call('LRANGE', intermediate, 0, 99)) do
    local seen = intermediate .. ':first_seen:' .. id
    local status = read(id, 'status')[1]
    if status ~= 'queued' then
      -- Started: a stock worker takes it out as it starts. Anything else: the entry is stale.
      if status ~= 'started' then redis.call('LREM', intermediate, 1, id) end
      redis.call('DEL', seen)
    elseif not redis.call('SET', seen, exact(now), 'NX', 'EX', 86400)
      and now - number(redis.call('GET', seen), 0) > 60 then
      redis.call('LREM', intermediate, 1, id)
      redis.call('DEL', seen)
      make_waiting(id, status, queue, true, now)
    end
  end
end
return expired
