-- The delayed jobs and retries whose time has come wait in their queue from now on.
-- ARGV: queues.
-- Answers how many.
local now, promoted = clock(), 0
for _, queue in ipairs(ARGV) do
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', registry('scheduled', queue), '-inf', now, 'LIMIT', 0, 1000)) do
    redis.call('ZREM', registry('scheduled', queue), id)
    local job = read(id, 'status', 'enqueue_at_front', 'enqueue_at_front_on_retry')
    if job[1] == 'scheduled' then
      make_waiting(id, job[1], queue, job[2] == '1' or job[3] == '1', now)
      promoted = promoted + 1
    end
  end
end
return promoted
