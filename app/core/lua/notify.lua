-- Tell of a job's end that RQ's own code has written, if somebody is to be told and its hash is still there.
-- ARGV: job id.
local status = read(ARGV[1], 'status')[1]
if status == 'finished' or status == 'failed' or status == 'stopped' or status == 'canceled' then
  notify(ARGV[1], status, clock())
end
