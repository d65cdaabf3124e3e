-- Send the message about a job's last end once more, at once. It is the same message, and it gets all its tries anew.
-- ARGV: job id, most jobs that the queue may hold.
-- Answers 'queued' (even if the message waits or runs already), 'full', or '' if there is no message.
local ids = redis.call('LRANGE', deliveries_key(ARGV[1]), -1, -1)
local id = ids[1]
local status = id and read(id, 'status')[1]
if not status then return '' end
if status == 'queued' or status == 'started' then return 'queued' end
if queue_length(WEBHOOKS) >= tonumber(ARGV[2]) then return 'full' end
for _, name in ipairs({'scheduled', 'finished', 'failed', 'canceled'}) do
  redis.call('ZREM', registry_key(name, WEBHOOKS), id)
end
redis.call('HDEL', job_key(id), 'crashes')
redis.call('HSET', job_key(id), 'retries_left', RETRIES)
redis.call('PERSIST', job_key(id))
make_waiting(id, status, WEBHOOKS, false, clock())
return 'queued'
