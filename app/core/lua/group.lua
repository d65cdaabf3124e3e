-- Read the statuses of a group's jobs. It changes nothing. (`SORT … GET` would do the same, but an ACL would have to
-- allow it to read all keys.)
-- ARGV: group id.
-- Answers {number of its jobs at first, '' if it is unknown; their statuses, '' for a job that is gone}.
local statuses = {}
for number, id in ipairs(redis.call('SMEMBERS', group_key(ARGV[1]))) do
  statuses[number] = read(id, 'status')[1] or ''
end
return {redis.call('GET', group_size_key(ARGV[1])) or '', statuses}
