-- Read a page of jobs, newest first. It looks at a limited number of jobs. If the filters let few of them through, the
-- page is short, and the cursor says where the next page begins.
-- ARGV: scope ('' for all jobs), owner ('*' for anybody; the page shows only jobs of this owner), status, queue and
-- function ('' for any), most jobs on a page, most jobs to look at, the two parts of the cursor (creation in
-- microseconds or '', job id), and the fields to read; they begin with status, function, origin, owner, created_at.
-- Answers {the two parts of the next cursor, or '' and ''; then for each job its id and its fields}.
local scope, owner, status, queue, fn, limit, most, from, after = unpack(ARGV)
limit, most = tonumber(limit), tonumber(most)

-- Iterate over the entries of one set, from the cursor on. If an entry has the cursor's own microsecond, its id
-- decides.
local function newest_first(key)
  local page, at, offset = {}, 1, 0
  return function()
    while true do
      if at > #page then
        page = redis.call('ZREVRANGEBYSCORE', key, from == '' and '+inf' or from, '-inf', 'WITHSCORES',
          'LIMIT', offset, limit + 1)
        at, offset = 1, offset + limit + 1
        if #page == 0 then return nil end
      end
      local id, created = page[at], page[at + 1]
      at = at + 2
      if created ~= from or id < after then return {id = id, created = created, key = key} end
    end
  end
end

local function is_newer(entry, than)
  local mine, other = tonumber(entry.created), tonumber(than.created)
  return mine > other or (mine == other and entry.id > than.id)
end

local heads, nexts = {}, {}
for number, each in ipairs(status == '' and STATUSES or {status}) do
  nexts[number] = newest_first(index_key(scope, each))
  heads[number] = nexts[number]() or nil
end

-- Jobs whose hash has expired. They leave the index here, because the sweep may need hours to get to them.
local gone = {}
local function answer(created, id, found)
  for _, entry in ipairs(gone) do redis.pcall('ZREM', entry.key, entry.id) end -- Redis may refuse writes
  return {created, id, unpack(found)}
end

local found, last = {}, nil
while true do
  local newest
  for number = 1, #nexts do
    if heads[number] and (not newest or is_newer(heads[number], heads[newest])) then newest = number end
  end
  if not newest then return answer('', '', found) end
  if #found == limit or most == 0 then return answer(last.created, last.id, found) end
  last, heads[newest], most = heads[newest], nexts[newest](), most - 1
  local job = read(last.id, unpack(ARGV, 10))
  if not (job[1] and job[5]) then
    gone[#gone + 1] = last
  elseif (owner == '*' or owner == (job[4] or '')) and (status == '' or status == job[1])
    and (queue == '' or queue == job[3]) and (fn == '' or fn == job[2]) then
    found[#found + 1] = {last.id, job}
  end
end
