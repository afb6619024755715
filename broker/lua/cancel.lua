-- Ends jobs as cancelled, waiting ones and running ones. A worker that runs one has lost its lease by
-- that, so what it may still answer is not recorded; it is told, so that it stops.
--   ARGV: ids of jobs
--   Returns {how many waited, how many ran, how many had ended already}; an id that names no job does
--   not count.
-- Safe to repeat: a job that is cancelled has ended.
local num_waiting, running, num_ended = 0, {}, 0
for _, id in ipairs(ARGV) do
  local state, worker = unpack(redis.call('HMGET', JOB .. id, 'state', 'worker'))
  if state == 'running' then
    end_job(id, 'cancelled', 'cancelled', 'cancelled while it ran on ' .. worker)
    table.insert(running, id)
  elseif TERMINAL[state] then
    num_ended = num_ended + 1
  elseif state then
    end_job(id, 'cancelled', 'cancelled', 'cancelled while it waited')
    num_waiting = num_waiting + 1
  end
end
if #running > 0 then redis.call('PUBLISH', CANCELLED, table.concat(running, ' ')) end
return { num_waiting, #running, num_ended }
