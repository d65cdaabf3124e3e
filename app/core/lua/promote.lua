-- Put the scheduled jobs that are due into their queues: delayed jobs, and retries after a pause.
-- ARGV: queues.
-- Answers {number of these jobs, seconds until the next job is due (0 if more are due now, '' if none is scheduled)}.
local now, promoted, due = clock(), 0, nil
for _, queue in ipairs(ARGV) do
  local front = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', registry_key('scheduled', queue), '-inf', now, 'LIMIT', 0, 1000)) do
    redis.call('ZREM', registry_key('scheduled', queue), id)
    local job = read(id, 'status', 'enqueue_at_front', 'enqueue_at_front_on_retry')
    if job[1] == 'scheduled' then
      promoted = promoted + 1
      if job[2] == '1' or job[3] == '1' then
        front[#front + 1] = id
      else
        make_waiting(id, job[1], queue, false, now)
      end
    end
  end
  -- The job that was due first is pushed last, to the very front.
  for number = #front, 1, -1 do make_waiting(front[number], 'scheduled', queue, true, now) end
  local first = redis.call('ZRANGE', registry_key('scheduled', queue), 0, 0, 'WITHSCORES')
  if first[2] then due = math.min(due or math.huge, math.max(0, number(first[2], math.huge) - now)) end
end
return {promoted, due and exact(due) or ''}
