-- Gives a worker jobs it can put into one batch: those of adapters it has in use, of the base
-- model, and of as many other adapters as it has free slots.
--   ARGV: worker, lease in ms, number of jobs, free slots, patience in ms,
--         n, then n adapters in use, m, then m adapters that may get no new jobs (draining),
--         then adapters resident in a slot that is not in use
--   Returns {now, starving, job, ...}: starving is an adapter that waits unserved for longer than
--   the patience and found no slot ('' if none); job is
--   {id, adapter, entry, payload, attempts, queued, submission}.
-- Adapters are served in the order in which they were last served; READY's score is that moment,
-- or the moment when the adapter came to have waiting jobs. Free slots go to adapters that waited
-- beyond the patience, then to those whose weights are resident, then to others.
local worker, lease, wanted = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local free_slots, patience = tonumber(ARGV[4]), tonumber(ARGV[5])
local position = 6
local function read_set()
  local set, last = {}, position + tonumber(ARGV[position])
  for i = position + 1, last do set[ARGV[i]] = true end
  position = last + 1
  return set
end
local in_use, draining = read_set(), read_set()
local resident = {}
for i = position, #ARGV do resident[ARGV[i]] = true end

local now = now_ms()
local starved_before = now_us() - 1000 * patience
local picks, starved, idle_resident, others = {}, {}, {}, {}

local function sort_by_claim_to_a_slot(name)
  local is_starved = tonumber(redis.call('ZSCORE', READY, name)) < starved_before
  table.insert(is_starved and starved or resident[name] and idle_resident or others, name)
end

-- Walks over the ready adapters, longest unserved first. An adapter that only another worker has
-- is left to it; one that the queue does not know at all is taken, so that its jobs fail.
local function sort_ready_adapters()
  local first, window = 0, 256
  while true do
    local names = redis.call('ZRANGE', READY, first, first + window - 1)
    for _, name in ipairs(names) do
      if name == BASE or in_use[name] then
        if not draining[name] then table.insert(picks, name) end
      elseif redis.call('SISMEMBER', WORKER .. worker .. ':adapters', name) == 1 then
        sort_by_claim_to_a_slot(name)
      elseif redis.call('HEXISTS', ADAPTERS, name) == 0 then
        table.insert(picks, name)
      end
    end
    local num_slotless = #starved + #idle_resident + #others
    local enough = #picks >= wanted and num_slotless >= free_slots
    if #names < window or enough then return end
    first = first + window
  end
end
sort_ready_adapters()

-- The starved come first: an adapter that drained to make room for them is still resident, and
-- would take its slot back.
local starving = starved[free_slots + 1] or ''
for _, names in ipairs({ starved, idle_resident, others }) do
  for _, name in ipairs(names) do
    if free_slots > 0 then
      free_slots = free_slots - 1
      table.insert(picks, name)
    end
  end
end

local score = {}
for _, name in ipairs(picks) do score[name] = tonumber(redis.call('ZSCORE', READY, name)) end
table.sort(picks, function(a, b)
  if score[a] ~= score[b] then return score[a] < score[b] end
  return a < b
end)

local reply = { text(now), starving }

local function deliver(adapter, entry, id)
  local state, payload, queued, submissions =
    unpack(redis.call('HMGET', JOB .. id, 'state', 'job', 'queued', 'submissions'))
  if state ~= 'waiting' then return drop_entry(adapter, entry) end
  local attempts = redis.call('HINCRBY', JOB .. id, 'attempts', 1)
  redis.call('HSET', JOB .. id, 'worker', worker, 'entry', entry, 'claimed', text(now))
  redis.call('ZADD', LEASES, text(now + lease), id)
  set_state(id, 'running')
  table.insert(reply, { id, adapter, entry, payload, attempts, queued,
    string.match(submissions, '%S+') })
  wanted = wanted - 1
end

-- Reads up to `count` entries; the group is made on first use, and again after a FLUSHALL.
local function read(adapter, count)
  local stream = STREAM .. adapter
  local function group_read()
    return redis.pcall('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', count, 'STREAMS', stream, '>')
  end
  local found = group_read()
  if type(found) == 'table' and found.err then
    if not string.find(found.err, 'NOGROUP', 1, true) then error(found) end
    redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
    found = group_read()
  end
  local entries = found and found[1] and found[1][2] or {}
  for _, entry in ipairs(entries) do deliver(adapter, entry[1], entry[2][2]) end
  if #entries < count then
    redis.call('ZREM', READY, adapter)
    if redis.call('XLEN', stream) == 0 then redis.call('DEL', stream) end
    return false
  end
  redis.call('ZADD', READY, 'XX', text(now_us()), adapter)
  return true
end

-- An equal share for every adapter first, then what is left to those that have more.
while wanted > 0 and #picks > 0 do
  local share = math.max(1, math.floor(wanted / #picks))
  local with_more = {}
  for _, adapter in ipairs(picks) do
    if wanted <= 0 then break end
    if read(adapter, math.min(share, wanted)) then table.insert(with_more, adapter) end
  end
  picks = with_more
end
return reply
