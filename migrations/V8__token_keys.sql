-- The keys that encrypt tokens (src/model/token.rs). Tokens are made with the key that has the
-- latest use_time that has passed, and every key here decodes the tokens that were made with it.
create table token_keys (
    -- In clear text at the beginning of each token.
    id smallint not null generated always as identity,

    -- gen_random_uuid() draws 122 bits from the strong random source of the server; three of
    -- them have more than the 256 bits of a key. No extension is needed.
    key bytea not null default sha256(
        uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
    ),

    -- By then, every replica has read the key.
    use_time timestamptz not null default now() + interval '1 minute',

    constraint token_keys_pkey primary key (id),
    constraint token_keys_key_length check (octet_length(key) = 32)
);

insert into token_keys (use_time) values (now());
