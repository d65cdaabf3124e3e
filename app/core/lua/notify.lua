-- Enqueue the message to a job's webhook, if it has one, after RQ's own code has ended the job. All other scripts that
-- end a job do this themselves. If RQ has deleted the job already, there is no message.
-- ARGV: job id.
-- Answers nothing.
local status = read(ARGV[1], 'status')[1]
if status == 'finished' or status == 'failed' or status == 'stopped' or status == 'canceled' then
  notify(ARGV[1], status, clock())
end
