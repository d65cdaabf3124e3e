-- Put a failed, stopped or canceled job back into its queue. It gets all its retries anew, and its crashes are
-- forgotten.
-- ARGV: job id, owner ('*' for anybody; the job must be this owner's), most jobs that the queue may hold.
-- Answers 'queued'; 'full'; '' if there is no such job; 'not <status>' if a job with this status cannot be retried.
local id, owner, limit = unpack(ARGV)
local job = read(id, 'status', 'owner', 'origin', 'created_at', 'retries', 'ttl')
local status, queue = job[1], job[3] or ''
if not (status and job[4]) or (owner ~= '*' and owner ~= (job[2] or '')) then return '' end
if status ~= 'failed' and status ~= 'stopped' and status ~= 'canceled' then return 'not ' .. status end
if queue_length(queue) >= tonumber(limit) then return 'full' end

local key = job_key(id)
redis.call('ZREM', registry_key('failed', queue), id)
redis.call('ZREM', registry_key('canceled', queue), id)
redis.call('HDEL', key, 'crashes')
if job[5] then redis.call('HSET', key, 'retries_left', job[5]) end
local ttl = integer(job[6], 0)
if ttl > 0 then redis.call('EXPIRE', key, ttl) else redis.call('PERSIST', key) end
make_waiting(id, status, queue, false, clock())
count('retried', queue, read(id, 'function')[1])
return 'queued'
