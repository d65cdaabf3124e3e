-- Keep the index of `/jobs` in step with the jobs: those whose keys have run out leave it, and those that RQ's own code
-- moved (a stock worker, `Job.cancel`) are put right. Each call looks at a hundred jobs of each set, from where the last
-- one stopped, and at more while many of them are gone, as Redis itself expires keys; but at a bounded number in all, since
-- Redis serves nobody meanwhile. Once a second, whoever calls.
-- Answers how many entries it changed.
if not redis.call('SET', RQ .. ':api:swept', 1, 'NX', 'PX', 1000) then return 0 end

local POSITIONS = RQ .. ':api:sweep'
local MOST = 3000 -- looked at, of all jobs and then of some owners' ones, after the first hundred of each set
local changed, left = 0, MOST

local function sweep(scope, status)
  local key = index(scope, status)
  local position = redis.call('HGET', POSITIONS, key) or '-inf'
  repeat
    local page = redis.call('ZRANGEBYSCORE', key, position, '+inf', 'WITHSCORES', 'LIMIT', 0, 100)
    local wrong = 0
    for at = 1, #page, 2 do
      local id = page[at]
      local job = read(id, 'status', 'created_at')
      if job[1] ~= status or not job[2] then
        wrong = wrong + 1
        redis.call('ZREM', key, id)
        if job[1] and job[2] then redis.call('ZADD', index(scope, job[1]), page[at + 1], id) end
      end
    end
    changed, left = changed + wrong, left - #page / 2
    if #page < 200 then
      redis.call('HDEL', POSITIONS, key)
      return
    end
    position = '(' .. page[#page]
  until wrong < 25 or left <= 0
  redis.call('HSET', POSITIONS, key, position)
end

for _, status in ipairs(STATUSES) do sweep('', status) end
left = MOST
for _, owner in ipairs(redis.call('SRANDMEMBER', OWNERS, 4)) do
  local entries = 0
  for _, status in ipairs(STATUSES) do
    sweep(owner, status)
    entries = entries + redis.call('ZCARD', index(owner, status))
  end
  if entries == 0 then redis.call('SREM', OWNERS, owner) end
end
return changed
