-- Run a job again that ended without a result, with its budgets of retries and crashes renewed.
-- ARGV: job id, owner of whom it must be ('*' for anybody), most jobs that the queue may hold.
-- Answers 'queued', 'full', '' if there is no such job, or the status that it has if that does not allow it.
local id, owner, limit = unpack(ARGV)
local job = read(id, 'status', 'owner', 'origin', 'created_at', 'retries', 'ttl')
local status, queue = job[1], job[3] or ''
if not (status and job[4]) or (owner ~= '*' and owner ~= (job[2] or '')) then return '' end
if status ~= 'failed' and status ~= 'stopped' and status ~= 'canceled' then return 'not ' .. status end
if length(queue) >= tonumber(limit) then return 'full' end

local key = job_key(id)
redis.call('ZREM', registry('failed', queue), id)
redis.call('ZREM', registry('canceled', queue), id)
redis.call('HDEL', key, 'crashes')
if job[5] then redis.call('HSET', key, 'retries_left', job[5]) end
local ttl = whole(job[6], 0)
if ttl > 0 then redis.call('EXPIRE', key, ttl) else redis.call('PERSIST', key) end
make_waiting(id, status, queue, false, clock())
count('retried', queue, read(id, 'function')[1])
return 'queued'
