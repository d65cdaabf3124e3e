-- End a run that has no outcome, because its worker ends, or because the work-horse or the worker died. The job goes to
-- the front of its queue. If its runs crashed too often, it fails.
-- ARGV: job id, execution id, queue, worker, crashed (1 to count a crash, else 0), crash limit, exception (base64 of
-- zlib), error (JSON), default failure TTL.
-- Answers 'queued'; 'failed'; 'stopped' if the run was asked to stop; 'lost' or 'rq', as `finish` does.
local id, execution, queue, worker, crashed, limit, exception, error, failure_ttl = unpack(ARGV)
local job = read(id, 'status', 'stop_requested', 'crashes', 'failure_ttl', 'repeats_left', 'rate_limit_key', 'webhooks',
  'function')
if clear_if_lost(id, execution, queue, worker, job[1]) then return 'lost' end

local crashes = integer(job[3], 0) + tonumber(crashed)
local status = 'failed'
if job[2] == execution then status, exception, error = 'stopped', STOPPED_EXCEPTION, STOPPED_ERROR end
local is_over = status == 'stopped' or (crashed == '1' and crashes > tonumber(limit))
if is_over and needs_rq(id, false, unpack(job, 5, 7)) then return 'rq' end

local now = clock()
end_execution(id, execution, queue, worker)
if crashed == '1' then
  redis.call('HSET', job_key(id), 'crashes', crashes)
  count('crashed', queue, job[8])
end
if is_over then
  local result = {'worker_name', worker, 'execution_id', execution, 'exc_string', exception}
  store_failure(id, 'started', queue, status, integer(job[4], failure_ttl), result, error, now)
  return status
end
make_waiting(id, 'started', queue, true, now)
return 'queued'
