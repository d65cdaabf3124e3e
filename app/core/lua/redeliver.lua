-- Deliver again what tells of a job's last end: at once, as the same message, with all its tries before it.
-- ARGV: job id, most jobs that the queue may hold.
-- Answers 'queued', 'full', or '' if there is no such message.
local ids = redis.call('LRANGE', deliveries_key(ARGV[1]), -1, -1)
local id = ids[1]
local status = id and read(id, 'status')[1]
if not status then return '' end
if status == 'queued' or status == 'started' then return 'queued' end
if length(WEBHOOKS) >= tonumber(ARGV[2]) then return 'full' end
for _, name in ipairs({'scheduled', 'finished', 'failed', 'canceled'}) do
  redis.call('ZREM', registry(name, WEBHOOKS), id)
end
redis.call('HDEL', job_key(id), 'crashes')
redis.call('HSET', job_key(id), 'retries_left', TRIES)
redis.call('PERSIST', job_key(id))
make_waiting(id, status, WEBHOOKS, false, clock())
return 'queued'
